"""Statistics over seeds: means, standard deviations, the Pareto front, the share of the gap that is closed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from simulations.report.load import Frame


def over_seeds(runs: Frame, columns: list[str]) -> Frame:
    """Mean and sample standard deviation (missing for one seed) of ``columns``, a row a method, in order of appearance.

    Columns of the result: ``reference``, ``seeds``, and ``<column>_mean``, ``<column>_sd``.
    """
    groups = runs.groupby("method", sort=False)
    parts = [groups["reference"].first(), groups["seed"].nunique().rename("seeds")]
    for column in columns:
        parts += [groups[column].mean().rename(f"{column}_mean"), groups[column].std(ddof=1).rename(f"{column}_sd")]
    return pd.concat(parts, axis=1)


def front(cost: Frame, score: Frame) -> Frame:
    """Which points no other dominates, that is costs and scores no worse, and one of both better."""
    chosen = []
    for x, y in zip(cost, score, strict=True):
        no_worse = (cost <= x) & (score >= y)
        chosen.append(bool(np.isfinite(y)) and not bool((no_worse & ((cost < x) | (score > y))).any()))
    return pd.Series(chosen, index=cost.index, dtype=bool)


def gap_closed(runs: Frame) -> Frame:
    """``(score - local) / (central - local)`` of every run whose seed has both references and a gap between them.

    Missing where a reference is missing or there are several of one (say, two learning rates), where ``central`` is no
    better than ``local``, and for the references themselves.
    """

    def of(kind: str) -> Frame:
        scores = runs[runs["kind"] == kind].groupby("seed")["score"]
        return runs["seed"].map(scores.mean().where(scores.size() == 1))

    local, gap = of("local"), of("central") - of("local")
    return ((runs["score"] - local) / gap).where((gap > 0) & ~runs["reference"])
