"""Many clients as one: the stacked mean is the mean of the clients one by one, and no copy changes a bit of it."""

from __future__ import annotations

import pytest
import torch

from fedlora import wire
from fedlora.adapters import State
from fedlora.adapters.lora import Lora
from fedlora.federation import Federation
from fedlora.lowrank import LowRank, relative_distance, weighted_mean
from strategies.base import require_lora
from strategies.means import exact_mean
from strategies.stacking import mean_update
from tests.conftest import Compose
from tests.fedlora.helpers import assert_same


def lora(tiny: Compose) -> Lora:
    return require_lora(Federation(tiny("adapter.rank=4", "adapter.alpha=6")).build_meta_model(), "flora", "")


def cohort(ranks: list[int], m: int = 40, n: int = 24) -> tuple[list[State], list[float]]:
    generator = torch.Generator().manual_seed(len(ranks))
    states = []
    for rank in ranks:
        layout = {}
        for module in ("query", "value"):
            layout |= {f"{module}.lora_A.weight": (rank, n), f"{module}.lora_B.weight": (m, rank)}
        flat = torch.randn(sum(a * b for a, b in layout.values()), generator=generator)
        states.append(wire.views(flat, layout))
    examples = torch.randint(1, 40, (len(ranks),), generator=generator).tolist()
    return states, [count / sum(examples) for count in examples]


def one_by_one(adapter: Lora, states: list[State], shares: list[float]) -> dict[str, LowRank]:
    doubles = ({key: value.double() for key, value in state.items()} for state in states)
    return weighted_mean((adapter.delta(state) for state in doubles), shares)


@pytest.mark.parametrize("ranks", [[4], [4, 2, 1], [8] * 400, [4, 2, 1, 3] * 300], ids=lambda ranks: str(len(ranks)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 1e-13)], ids=str)
def test_stacks_add_up_to_the_exact_mean(tiny: Compose, ranks: list[int], dtype: torch.dtype, tolerance: float) -> None:
    adapter = lora(tiny)
    states, shares = cohort(ranks)
    exact = one_by_one(adapter, states, shares)
    mean = mean_update(adapter, states, shares, dtype=dtype)
    assert {delta.left.dtype for delta in mean.values()} == {dtype}
    assert {delta.rank for delta in mean.values()} == {min(sum(ranks), 24)}
    doubled = {module: LowRank(delta.left.double(), delta.right.double()) for module, delta in mean.items()}
    assert relative_distance(exact, doubled) < tolerance


@pytest.mark.parametrize("clients", [3, 500])
def test_factors_are_centred_before_they_are_multiplied(tiny: Compose, clients: int) -> None:
    adapter = lora(tiny)
    states, shares = cohort([3] * clients)
    centre = {key: value + 1e-3 for key, value in states[0].items()}
    moved = [{key: value - centre[key] for key, value in state.items()} for state in states]
    exact = one_by_one(adapter, moved, shares)
    assert relative_distance(exact, mean_update(adapter, states, shares, around=centre)) < 1e-6


def test_a_sum_sees_what_it_is_asked_to_see(tiny: Compose) -> None:
    adapter = lora(tiny)
    states, shares = cohort([4] * 500)
    few = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    seen = mean_update(adapter, states, shares, seen=lambda _, delta: LowRank(delta.left, delta.right @ few))
    for module, whole in mean_update(adapter, states, shares).items():
        torch.testing.assert_close(seen[module].dense(), whole.dense() @ few, rtol=1e-5, atol=1e-5)


def test_operands_are_not_modified(tiny: Compose) -> None:
    states, shares = cohort([4] * 300)
    before = [{key: value.clone() for key, value in state.items()} for state in states]
    mean_update(lora(tiny), states, shares, around=before[0])
    exact_mean(states, shares, states[0])
    assert all(
        torch.equal(value, b[key]) for state, b in zip(states, before, strict=True) for key, value in state.items()
    )


@pytest.mark.parametrize("keys", [[], ["value.lora_A.weight"], ["value.lora_B.weight", "query.lora_A.weight"]], ids=str)
def test_a_mean_of_factors_has_the_same_bits_wherever_they_lie(keys: list[str]) -> None:
    states, shares = cohort([4] * 7)
    names = keys or list(states[0])
    scattered = [{key: value.clone() for key, value in state.items()} for state in states]
    turned = [{key: value.T.contiguous().T for key, value in state.items()} for state in states]
    mean = exact_mean(states, shares, names)
    for places in (scattered, turned):
        assert_same(exact_mean(places, shares, names), mean)
    for key in names:
        expected = torch.zeros(states[0][key].shape, dtype=torch.float64)
        for state, share in zip(states, shares, strict=True):
            expected.add_(state[key], alpha=share)
        torch.testing.assert_close(mean[key], expected, rtol=1e-14, atol=1e-14)
    clipped = [{**state, "query.lora_B.weight": state["query.lora_B.weight"].clamp(-0.1, 0.1)} for state in states]
    assert exact_mean(clipped, shares, states[0])["query.lora_B.weight"].abs().max() <= 0.1 + 1e-8


def test_a_mean_of_no_tensors_is_empty() -> None:
    states, shares = cohort([4, 4])
    assert exact_mean(states, shares, []) == {}
