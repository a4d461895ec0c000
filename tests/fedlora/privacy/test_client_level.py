"""The mathematics of client-level privacy: clipping, the adaptive norm, and what rounds cost, by two accountants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm as normal

from fedlora.errors import InputError
from fedlora.privacy.client_level import (
    clipped,
    clipped_sum,
    epsilon_of,
    moved,
    next_clip,
    noise_multiplier_for,
    settled_delta,
    split_noise,
    update_of,
)

POISSON = [(1.0, 100, 1e-5, 0.05), (0.8, 12, 1e-3, 4 / 284), (2.0, 300, 1e-6, 0.2)]
KNOWN = [(1.0, 10, 1e-5), (4.0, 50, 1e-5), (0.7, 1, 1e-3)]


@given(seed=st.integers(0, 2**31), norm=st.floats(1e-6, 1e6), scale=st.floats(1e-6, 1e6))
def test_a_clipped_update_keeps_its_direction_and_is_at_most_as_long_as_the_norm(seed, norm, scale) -> None:
    update = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    result = clipped(update, norm)
    assert float(result.norm()) <= norm * (1 + 1e-12)
    assert float(torch.dot(result, update)) == pytest.approx(float(result.norm() * update.norm()), rel=1e-9)
    if float(update.norm()) <= norm:
        assert torch.equal(result, update)


@given(seed=st.integers(0, 2**31))
def test_an_update_added_to_what_was_sent_is_the_state(seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    sent = {"a": torch.randn(3, 2, generator=draw), "b": torch.randn(4, generator=draw)}
    state = {key: torch.randn(value.shape, generator=draw) for key, value in sent.items()}
    back = moved(sent, update_of(state, sent))
    assert all(torch.equal(back[key], state[key]) for key in state)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), norm=st.floats(1e-3, 10))
def test_one_client_more_changes_the_sum_by_the_norm_at_most(seed, norm) -> None:
    updates = list(torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3)
    one, _ = clipped_sum(updates, norm, 9)
    two, _ = clipped_sum(updates[:-1], norm, 9)
    assert float((one - two).norm()) <= norm * (1 + 1e-9)


@given(noise=st.floats(1e-2, 1e3), clients=st.integers(1, 10**6))
def test_update_and_count_together_cost_what_was_asked(noise, clients) -> None:
    update, count = split_noise(noise, clients)
    assert update**-2 + (2 * count) ** -2 == pytest.approx(noise**-2, rel=1e-9)
    assert noise < update <= 1.021 * noise


@given(noise=st.floats(-5, 5), clients=st.integers(1, 500), quantile=st.floats(0.1, 0.9))
def test_one_client_more_moves_the_count_by_one_half(noise, clients, quantile) -> None:
    without = [True] * (clients - 1)
    start = next_clip(1.0, without, clients, quantile, noise)
    for inside in (True, False):
        other = next_clip(1.0, [*without, inside], clients, quantile, noise)
        assert abs(math.log(other / start)) == pytest.approx(0.2 * 0.5 / clients, rel=1e-6)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_adaptive_norm_finds_the_quantile(quantile: float) -> None:
    rng, clip = np.random.default_rng(0), 10.0
    for _ in range(200):
        clip = next_clip(clip, rng.lognormal(-2, 1, 400) <= clip, 400, quantile, rng.normal(0, 20))
    assert clip == pytest.approx(math.exp(-2 + normal.ppf(quantile)), rel=0.15)


@pytest.mark.parametrize(("noise", "rounds", "delta", "rate"), POISSON)
def test_secret_cohorts_cost_what_the_accountants_of_opacus_say(noise, rounds, delta, rate) -> None:
    renyi, loss = RDPAccountant(), PRVAccountant()
    renyi.history = loss.history = [(noise, rate, rounds)]
    assert epsilon_of(noise, rounds, delta, "rdp", rate) == pytest.approx(renyi.get_epsilon(delta), rel=1e-2)
    expected = loss.get_epsilon(delta, eps_error=0.002)
    assert epsilon_of(noise, rounds, delta, "prv", rate) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("noise", "rounds", "delta"), KNOWN)
def test_known_cohorts_cost_what_the_gaussian_mechanism_costs(noise, rounds, delta) -> None:
    shift = math.sqrt(rounds) / noise  # Balle and Wang 2018, theorem 8

    def excess(epsilon: float) -> float:
        first = normal.cdf(shift / 2 - epsilon / shift)
        return float(first - math.exp(epsilon) * normal.cdf(-shift / 2 - epsilon / shift) - delta)

    exact = brentq(excess, 0, 100)
    assert epsilon_of(noise, rounds, delta, "prv") == pytest.approx(exact, rel=1e-6)
    assert exact <= epsilon_of(noise, rounds, delta, "rdp") <= 1.3 * exact


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((1.0, 100, 1e-5, "rdp", 0.05), 4.0389), ((1.0, 100, 1e-5, "prv", 0.05), 3.5021),
        ((1.0, 10, 1e-5, "rdp", None), 19.0536), ((1.0, 10, 1e-5, "prv", None), 17.8566),
        ((0.8, 12, 1e-5, "rdp", 4 / 284), 2.0373), ((0.8, 12, 1e-5, "prv", 4 / 284), 1.2521),
    ],
)  # fmt: skip
def test_what_rounds_cost_stays_what_it_was(case, expected: float) -> None:
    assert epsilon_of(*case) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("rate", [None, 0.05])
@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_same_rounds_in_many_calls_and_in_one_cost_the_same(accountant, rate) -> None:
    import dp_accounting

    kind = {"rdp": dp_accounting.rdp.RdpAccountant, "prv": dp_accounting.pld.PLDAccountant}[accountant]
    event = dp_accounting.GaussianDpEvent(2.0)
    one_by_one = kind(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for _ in range(20):
        one_by_one.compose(event if rate is None else dp_accounting.PoissonSampledDpEvent(rate, event))
    assert epsilon_of(2.0, 20, 1e-5, accountant, rate) == pytest.approx(one_by_one.get_epsilon(1e-5), rel=2e-3)


@pytest.mark.parametrize("rate", [None, 0.1])
@pytest.mark.parametrize("epsilon", [0.1, 3.0, 30.0])
def test_solved_noise_spends_the_budget_and_no_more(epsilon: float, rate: float | None) -> None:
    noise = noise_multiplier_for(epsilon, 25, 1e-5, "rdp", rate)
    assert 0.995 * epsilon <= epsilon_of(noise, 25, 1e-5, "rdp", rate) <= epsilon


@pytest.mark.slow
def test_the_tighter_accountant_needs_less_noise() -> None:
    renyi, loss = (noise_multiplier_for(4.0, 20, 1e-4, each, 0.2) for each in ("rdp", "prv"))
    assert epsilon_of(loss, 20, 1e-4, "prv", 0.2) <= 4
    assert 0.7 * renyi < loss < renyi


def test_secrecy_is_cheaper_and_nothing_costs_nothing() -> None:
    assert epsilon_of(1.0, 100, 1e-5, "rdp", 0.05) < epsilon_of(1.0, 100, 1e-5, "rdp") / 10
    assert epsilon_of(1.0, 0, 1e-5, "rdp") == 0
    assert epsilon_of(0.0, 1, 1e-5, "rdp") == math.inf


def test_a_budget_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(InputError, match=r"privacy\.epsilon = 0\.001 at privacy\.delta = 1e-30 cannot be shown"):
        noise_multiplier_for(1e-3, 5, 1e-30, "rdp")


@pytest.mark.parametrize("clients", [2, 9, 100_000])
def test_delta_is_below_one_over_the_clients(clients: int) -> None:
    assert settled_delta(None, clients) < 1 / clients
    assert settled_delta(0.5 / clients, clients) == 0.5 / clients
    with pytest.raises(InputError, match=r"privacy\.delta = .* is not below"):
        settled_delta(1 / clients, clients)
