"""Audits: a lower bound on epsilon from what a mechanism releases, against the upper bound that is claimed for it.

Whoever sees the releases guesses whether one record, the canary, was among the data (Nasr et al. 2021, arXiv
2101.04535). Under (ε, δ)-differential privacy no guess is good: its rates of false positives and false negatives obey
``FPR >= exp(-ε) (1 - δ - FNR)``, and the same with both exchanged (Kairouz, Oh and Viswanath 2015, arXiv 1311.0776).
Rates that break this for the claimed ε refute the claim; a bound below it proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import beta


def epsilon_at_least(
    without: np.ndarray, within: np.ndarray, thresholds: Sequence[float], delta: float, confidence: float = 0.99
) -> float:
    """The epsilon that a mechanism spends at least, from independent releases of two worlds.

    A release counts as one of data with the canary if its score reaches a threshold. The rates are taken at their upper
    confidence limits (Clopper and Pearson; Jagielski, Ullman and Oprea 2020, arXiv 2006.07709), so the bound is finite.

    Args:
        without: scores of releases from data without the canary ``[releases]``.
        within: scores of as many releases from the same data and the canary.
        thresholds: chosen without a look at the scores; the confidence holds for all of them together.
        delta: that epsilon belongs to.
        confidence: probability with which the bound holds.

    Returns:
        The largest bound of all thresholds, 0 where nothing can be shown.
    """
    releases = len(without)
    each = 1 - (1 - confidence) / (2 * len(thresholds))
    false = np.array([[np.sum(without >= t), np.sum(within < t)] for t in thresholds])
    limits = np.where(false == releases, 1.0, beta.ppf(each, false + 1, np.maximum(releases - false, 1)))
    kept = np.maximum(1 - delta - limits[:, ::-1], 1e-300)
    return max(0.0, float(np.log(kept / limits).max()))
