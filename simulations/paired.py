"""Are two methods different? Paired differences over seeds, with confidence intervals and Holm's correction.

A seed fixes the clients, the rows and the draws of every method alike, so differences are taken within each seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """How a method differs from the reference.

    Attributes:
        method: its name.
        mean: of the differences method - reference, over common seeds.
        low: lower end of the confidence interval of the mean (Student's t).
        high: upper end.
        p: of the paired t-test, two-sided.
        p_holm: the same, corrected for the number of methods.
        seeds: how many.
    """

    method: str
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    seeds: int


def paired_differences(values: Mapping[str, Mapping[int, float]], reference: str) -> list[Difference]:
    """Compare every method with ``reference`` over the seeds that both have; methods with fewer than two are left out.

    Args:
        values: ``{method: {seed: value of the metric}}``.
        reference: one of the methods.
    """
    found: list[tuple[str, np.ndarray]] = []
    for method, of_seed in values.items():
        common = sorted(of_seed.keys() & values[reference].keys())
        if method != reference and len(common) > 1:
            found.append((method, np.array([of_seed[seed] - values[reference][seed] for seed in common])))
    tested = [_tested(differences) for _, differences in found]
    corrected = holm([p for *_, p in tested])
    return [
        Difference(method, float(differences.mean()), low, high, p, corrected[number], len(differences))
        for number, ((method, differences), (low, high, p)) in enumerate(zip(found, tested, strict=True))
    ]


def _tested(differences: np.ndarray) -> tuple[float, float, float]:
    """Confidence interval of the mean and p-value of the hypothesis that it is zero."""
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():  # all the same but for rounding: nothing to judge by
        mean = float(differences.mean())
        return mean, mean, 1.0 if mean == 0 else 0.0
    result: Any = stats.ttest_1samp(differences, 0.0)
    low, high = result.confidence_interval(LEVEL)
    return float(low), float(high), float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): the k-th smallest p of m times m - k + 1, never falling, at most 1."""
    corrected, highest, count = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, number in enumerate(sorted(range(count), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (count - rank) * p_values[number]))
        corrected[number] = highest
    return corrected
