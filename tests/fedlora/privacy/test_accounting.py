"""Epsilon is that of Opacus, and the same whether steps are told at once or round by round."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant

from fedlora.privacy.accounting import Accountant, Steps, default_delta, epsilon_of, solved_noise

PINNED: list[tuple[Accountant, float, float, int, float, float]] = [
    ("rdp", 1.0, 0.01, 1000, 1e-5, 2.1014),
    ("rdp", 0.8, 0.064, 300, 5e-4, 10.4613),
    ("prv", 1.0, 0.01, 1000, 1e-5, 1.8384),
]
"""Accountant, noise multiplier, sample rate, steps, delta, and epsilon as stock Opacus 1.6 printed it."""


@pytest.mark.parametrize(("name", "noise", "rate", "steps", "delta", "epsilon"), PINNED)
def test_epsilon_equals_opacus_at_once_and_round_by_round(
    name: Accountant, noise: float, rate: float, steps: int, delta: float, epsilon: float
) -> None:
    stock: Any = {"rdp": RDPAccountant, "prv": PRVAccountant}[name]()
    for _ in range(steps):
        stock.step(noise_multiplier=noise, sample_rate=rate)
    rounds = [Steps(noise, rate, steps // 10)] * 10
    assert epsilon_of(rounds, delta, name) == pytest.approx(stock.get_epsilon(delta), abs=1e-9)
    assert epsilon_of([Steps(noise, rate, steps)], delta, name) == pytest.approx(epsilon, abs=1e-2)


def test_a_client_of_one_batch_has_the_epsilon_of_the_gaussian_mechanism() -> None:
    """Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu) = delta (Balle and Wang 2018, theorem 8)."""
    phi = NormalDist().cdf
    for noise, delta in ((1.0, 1e-2), (2.0, 1e-3)):
        epsilon = epsilon_of([Steps(noise, 1.0, 1)], delta, "prv")
        exact = phi(0.5 / noise - epsilon * noise) - math.exp(epsilon) * phi(-0.5 / noise - epsilon * noise)
        assert exact == pytest.approx(delta, rel=0.1)  # epsilon is rounded up by 0.01
        assert exact <= delta
        assert epsilon_of([Steps(noise, 1.0, 1)], delta, "rdp") > epsilon


@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), [(1.0, 0.01, 1000, 1e-5), (1.3, 0.1, 120, 1e-4)])
def test_epsilon_equals_dp_accounting(noise: float, rate: float, steps: int, delta: float) -> None:
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    event = dp_accounting.SelfComposedDpEvent(step, steps)
    ours = [Steps(noise, rate, steps // 4)] * 4
    renyi = rdp.RdpAccountant().compose(event).get_epsilon(delta)
    assert epsilon_of(ours, delta, "rdp") == pytest.approx(renyi, abs=1e-2)
    loss = pld.PLDAccountant().compose(event).get_epsilon(delta)
    assert loss <= epsilon_of(ours, delta, "prv") <= loss + 0.012  # an upper bound with an allowance of 0.01


def test_different_rounds_are_composed_in_any_order() -> None:
    steps = [Steps(1.0, 0.05, 20), Steps(2.0, 0.1, 5), Steps(1.0, 0.05, 7)]
    assert epsilon_of(steps, 1e-4, "rdp") == epsilon_of(reversed(steps), 1e-4, "rdp")
    assert epsilon_of(steps, 1e-4, "rdp") > epsilon_of(steps[:2], 1e-4, "rdp")


def test_epsilon_is_never_below_zero() -> None:
    assert epsilon_of([Steps(1000.0, 1.0, 1)], 0.4, "rdp") == 0.0


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon_of([], 1e-5, "rdp") == 0.0
    assert epsilon_of([Steps(1.0, 0.1, 5), Steps(0.0, 0.1, 1)], 1e-5, "rdp") == math.inf


@settings(max_examples=8, deadline=None)
@given(
    epsilon=st.floats(0.3, 20.0), records=st.integers(50, 5000), batch=st.integers(1, 50), steps=st.integers(1, 2000)
)
def test_solved_noise_keeps_the_budget_and_wastes_little_of_it(
    epsilon: float, records: int, batch: int, steps: int
) -> None:
    delta, rate = default_delta(records), batch / records
    noise = solved_noise(epsilon, delta, rate, steps, "rdp")
    spent = epsilon_of([Steps(noise, rate, steps)], delta, "rdp")
    assert epsilon * 0.98 - 0.02 <= spent <= epsilon


@given(st.integers(1, 10**7))
def test_the_default_delta_is_below_one_in_all_records(records: int) -> None:
    assert default_delta(records) < 1 / records
