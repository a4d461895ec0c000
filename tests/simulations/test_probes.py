"""Large cohorts are measured through a few directions: exact stays exact, and the error of others is the dense one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedlora.adapters import State
from fedlora.adapters.lora import Lora
from fedlora.federation import Federation
from fedlora.lowrank import LowRank, relative_distance
from simulations.probes import probes
from strategies.base import require_lora
from strategies.means import exact_mean
from strategies.stacking import mean_update
from tests.conftest import Compose

M, N, RANK, CLIENTS = 192, 256, 8, 300
MODULES = tuple(f"layer.{number}" for number in range(12))
SHARES = [1 / CLIENTS] * CLIENTS


@pytest.fixture(scope="module")
def clients() -> list[State]:
    """Factors around common ones whose components fall off, as training makes them."""
    generator = torch.Generator().manual_seed(3)
    strength = 0.5 ** torch.arange(RANK)
    start = {f"{module}.lora_B.weight": torch.randn(M, RANK, generator=generator) * strength for module in MODULES}
    start |= {f"{module}.lora_A.weight": torch.randn(RANK, N, generator=generator) for module in MODULES}
    return [
        {key: value + 0.7 * torch.randn(value.shape, generator=generator) for key, value in start.items()}
        for _ in range(CLIENTS)
    ]


@pytest.fixture
def adapter(tiny: Compose) -> Lora:
    return require_lora(Federation(tiny("adapter.rank=4")).build_meta_model(), "flora", "")


def through(seed: int, states: list[State]) -> Callable[[str, LowRank], LowRank]:
    directions = probes(states, seed)
    assert set(directions) == set(MODULES)
    return lambda module, delta: delta.through(directions[module])


@pytest.mark.parametrize("case", ["factors averaged", "truncated", "a client forgotten"])
def test_the_error_of_an_inexact_aggregate_is_the_dense_one(adapter: Lora, clients: list[State], case: str) -> None:
    whole = mean_update(adapter, clients, SHARES, dtype=torch.float64)
    if case == "factors averaged":
        actual = adapter.delta(exact_mean(clients, SHARES, clients[0]))
    elif case == "truncated":
        actual = {module: delta.truncate(4) for module, delta in whole.items()}
    else:
        actual = mean_update(adapter, clients[1:], SHARES[1:], dtype=torch.float64)
    dense = relative_distance(whole, actual)
    probed = []
    for seed in range(5):
        seen = through(seed, clients)
        expected = mean_update(adapter, clients, SHARES, seen=seen)
        probed.append(relative_distance(expected, {module: seen(module, delta) for module, delta in actual.items()}))
    assert probed == pytest.approx([dense] * 5, rel=0.1)  # three standard errors
    assert sum(probed) / 5 == pytest.approx(dense, rel=0.04)


def test_an_exact_aggregate_reads_exact_and_one_wrong_number_does_not(adapter: Lora, clients: list[State]) -> None:
    seen = through(0, clients)
    expected = mean_update(adapter, clients, SHARES, seen=seen)
    actual = mean_update(adapter, clients, SHARES)
    assert relative_distance(expected, {module: seen(module, delta) for module, delta in actual.items()}) < 5e-7
    dense = actual[MODULES[7]].dense()
    dense[5, 9] += 0.1
    actual[MODULES[7]] = LowRank(torch.eye(M), dense)
    assert relative_distance(expected, {module: seen(module, delta) for module, delta in actual.items()}) > 1e-5


def test_small_cohorts_small_models_and_few_modules_are_measured_whole(clients: list[State]) -> None:
    assert probes(clients[:256], 0) == {}
    few = [{key: state[key] for key in state if key.startswith(MODULES[:2])} for state in clients]
    assert probes(few, 0) == {}
    small = [{key: value[:20, :20] for key, value in state.items()} for state in clients]
    assert probes(small, 0) == {}


def test_directions_come_from_the_seed(clients: list[State]) -> None:
    one, again, other = probes(clients, 1), probes(clients, 1), probes(clients, 2)
    for module in MODULES:
        assert torch.equal(one[module], again[module])
        assert not torch.equal(one[module], other[module])
        assert one[module].square().sum(1).mean().item() == pytest.approx(1.0, rel=0.1)
