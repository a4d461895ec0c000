"""What releases cost: epsilon of Poisson-subsampled Gaussian mechanisms, composed by the accountants of Opacus."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

Accountant = Literal["rdp", "prv"]


@dataclass(frozen=True)
class Steps:
    """Steps of DP-SGD that are alike.

    Attributes:
        noise_multiplier: standard deviation of the noise over the clipping norm.
        sample_rate: probability with which a record is in a batch.
        count: number of steps.
    """

    noise_multiplier: float
    sample_rate: float
    count: int


def epsilon_of(releases: Iterable[Steps], delta: float, accountant: Accountant) -> float:
    """Epsilon at ``delta`` of everything in ``releases`` together, for one record more or less.

    Equal steps of different rounds are the same to the accountant as steps of one round (Mironov, Talwar and Zhang 2019
    for ``rdp``; Gopi, Lee and Wutschitz 2021 for ``prv``, whose upper bound is taken). Without noise it is infinite.
    """
    counts: dict[tuple[float, float], int] = {}
    for each in releases:
        key = each.noise_multiplier, each.sample_rate
        counts[key] = counts.get(key, 0) + each.count
    history = tuple((*key, count) for key, count in sorted(counts.items()) if count)
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    return _epsilon(history, delta, accountant)


@lru_cache(maxsize=65536)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float, name: Accountant) -> float:
    from opacus.accountants import RDPAccountant, create_accountant  # three seconds that only private runs need
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with _quiet():
        if name == "rdp":
            orders = RDPAccountant.DEFAULT_ALPHAS
            spent = np.sum([_renyi(noise, rate) * count for noise, rate, count in history], axis=0)
            epsilon, _ = get_privacy_spent(orders=orders, rdp=spent.tolist(), delta=delta)
        else:
            accountant = create_accountant(mechanism=name)
            accountant.history = list(history)
            epsilon = accountant.get_epsilon(delta=delta)
    return max(0.0, float(epsilon))  # a formula may fall below it for a large delta


@lru_cache(maxsize=65536)
def _renyi(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """What one step costs at each of Opacus's orders; steps add up."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    cost = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS)
    return np.asarray(cost)


@lru_cache(maxsize=65536)
def solved_noise(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant) -> float:
    """The smallest noise multiplier with which ``steps`` steps cost at most ``epsilon`` (to 0.01 below it).

    Raises:
        ValueError: no noise is enough.
    """
    from opacus.accountants.utils import get_noise_multiplier

    with _quiet():
        return float(
            get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=accountant,
                epsilon_tolerance=min(0.01, epsilon / 100),
            )
        )


def finite(epsilon: float) -> float | None:
    """``epsilon``, or ``None`` where there is no bound."""
    return epsilon if math.isfinite(epsilon) else None


def default_delta(records: int) -> float:
    """1 / N^1.1, below the 1 / N at which one record could be published outright."""
    return max(records, 2) ** -1.1


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of Opacus that leave epsilon right: of orders, and of log(0) at a sample rate of 1."""
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha")
        yield
