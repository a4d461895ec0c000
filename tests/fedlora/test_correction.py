from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora import wire
from fedlora.correction import CorrectionLog, CorrectionUpdate, apply_update, layout_of, versions
from fedlora.errors import FedloraError
from fedlora.lowrank import LowRank

SHAPES = {"wide": (6, 20), "square": (9, 9), "tall": (16, 5)}
CLIENTS = 4
# For every round: which clients are asked, and which of those fail (their base is unknown afterwards).
ROUNDS = st.lists(
    st.tuples(st.sets(st.integers(0, CLIENTS - 1)), st.sets(st.integers(0, CLIENTS - 1))), min_size=1, max_size=12
)
RANKS = st.integers(0, 6)
promise = settings(deadline=None, max_examples=60)


def residuals(rank: int, seed: int) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
        for name, (m, n) in SHAPES.items()
    }


def delivered(held: dict[str, Tensor], update: CorrectionUpdate) -> dict[str, Tensor]:
    """What a client holds after the update has travelled as bytes."""
    header = update.header()
    record = wire.pack(update.tensors())
    return apply_update(held, header, wire.unpack(record, layout_of(header, SHAPES)))


def numbers(update: CorrectionUpdate) -> int:
    return sum(tensor.numel() for tensor in update.tensors().values())


def log_of(ranks: list[int]) -> CorrectionLog:
    log = CorrectionLog()
    for seed, rank in enumerate(ranks):
        log.append(residuals(rank, seed))
    return log


@promise
@given(ROUNDS, st.data())
def test_every_client_ends_at_the_servers_total_whenever_it_took_part(rounds, data):
    log, true_total = CorrectionLog(), {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    version: dict[int, int | None] = dict.fromkeys(range(CLIENTS), 0)
    held: dict[int, dict[str, Tensor]] = {client: {} for client in range(CLIENTS)}

    def bring_up_to_date(client: int) -> None:
        update = log.update_since(version[client])
        if update is not None:
            assert versions(update.header()) == (version[client], log.version)
            held[client] = delivered(held[client], update)
        for name, total in true_total.items():
            mine = held[client].get(name, torch.zeros(SHAPES[name]))
            torch.testing.assert_close(mine.double(), total, rtol=1e-4, atol=1e-4)

    for seed, (asked, failing) in enumerate(rounds):
        for client in asked:
            bring_up_to_date(client)
            version[client] = None if client in failing else log.version
            if client in failing:
                held[client] = {name: torch.full(shape, 99.0) for name, shape in SHAPES.items()}
        new = residuals(data.draw(RANKS), seed)
        log.append(new)
        for name, residual in new.items():
            true_total[name] += residual.left.double() @ residual.right.double()
    for client in range(CLIENTS):
        bring_up_to_date(client)


@promise
@given(st.lists(RANKS, min_size=1, max_size=10), st.data())
def test_each_module_travels_in_the_cheaper_form(ranks, data):
    log = log_of(ranks)
    since = data.draw(st.integers(0, len(ranks) - 1))
    update = log.update_since(since)
    for name, (m, n) in SHAPES.items():
        factored = sum(ranks[since:]) * (m + n)
        assert (name in update.factored) == (factored < m * n)
        assert (name in update.dense) == (factored >= m * n)
    assert numbers(update) == sum(min(sum(ranks[since:]) * (m + n), m * n) for m, n in SHAPES.values())


def test_one_module_may_be_factored_while_another_is_dense():
    update = log_of([4]).update_since(0)
    assert set(update.factored) == {"wide", "square"}  # 4 * 26 < 6 * 20 and 4 * 18 < 9 * 9
    assert set(update.dense) == {"tall"}  # 4 * 21 > 16 * 5


def test_a_client_whose_base_is_unknown_gets_the_whole_sum():
    log = log_of([1, 1])
    update = log.update_since(None)
    assert update.since is None
    assert set(update.dense) == set(SHAPES)
    assert update.factored == {}
    wrong = {name: torch.full(shape, 7.0) for name, shape in SHAPES.items()}
    for name, value in delivered(wrong, update).items():
        assert torch.equal(value, log.total[name])


def test_a_client_that_is_up_to_date_gets_nothing():
    assert CorrectionLog().update_since(0) is None
    assert log_of([1, 2]).update_since(2) is None


def test_residuals_that_nobody_will_be_sent_are_forgotten():
    log = log_of([1] * 40)
    assert min(log.recent) > 1
    worst = max(m * n / (m + n) for m, n in SHAPES.values())
    assert len(log.recent) <= worst + 1
    assert set(log.update_since(0).dense) == set(SHAPES)


def test_an_update_of_every_factored_version_adds_up_to_the_bits_of_the_server():
    log = log_of([1, 1, 1])
    held: dict[str, Tensor] = {}
    held = delivered(held, log.update_since(0))
    for name, total in log.total.items():
        assert torch.equal(held[name], total)


def test_applying_an_update_leaves_the_old_base_alone():
    log = log_of([1])
    held = delivered({}, log.update_since(0))
    before = {name: value.clone() for name, value in held.items()}
    log.append(residuals(1, 9))
    delivered(held, log.update_since(1))
    for name, value in before.items():
        assert torch.equal(held[name], value)


@promise
@given(st.lists(RANKS, min_size=1, max_size=6), st.data())
def test_the_layout_can_be_read_from_the_header(ranks, data):
    log = log_of(ranks)
    update = log.update_since(data.draw(st.one_of(st.none(), st.integers(0, len(ranks) - 1))))
    layout = layout_of(update.header(), SHAPES)
    assert layout == {key: tuple(value.shape) for key, value in update.tensors().items()}
    assert list(layout) == list(update.tensors())
    assert versions(update.header()) == (update.since, update.until)


def test_a_correction_of_an_unknown_module_is_refused():
    header = log_of([1]).update_since(None).header()
    with pytest.raises(FedloraError, match="square"):
        layout_of(header, {name: shape for name, shape in SHAPES.items() if name != "square"})


@promise
@given(st.lists(RANKS, max_size=6), st.lists(RANKS, max_size=4))
def test_a_log_that_was_saved_goes_on_as_if_it_had_not_been(before, after):
    log, restored = log_of(before), CorrectionLog()
    restored.load_state_dict(log.state_dict())
    for seed, rank in enumerate(after, 100):
        log.append(residuals(rank, seed))
        restored.append(residuals(rank, seed))
    for since in [None, *range(len(before) + len(after) + 1)]:
        one, other = log.update_since(since), restored.update_since(since)
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.header() == other.header()
            assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True))


def test_a_saved_log_is_plain_and_does_not_change_with_the_log():
    log = log_of([1])
    state = log.state_dict()
    total = state["total"]["square"].clone()
    log.append(residuals(1, 5))
    assert state["version"] == 1
    assert torch.equal(state["total"]["square"], total)
    assert list(state["recent"]) == [1]
    assert json.dumps(list(state)) == '["version", "total", "recent"]'
