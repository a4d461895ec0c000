"""Common steps give every client what it gets alone, for every PEFT layer that can be run client by client."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.client import Worker
from fedlora.cohort import Member, Trained
from fedlora.federation import Federation
from fedlora.store import ClientStore
from fedlora.tasks import Batch
from fedlora.tasks.classification import Classification
from tests.conftest import Compose
from tests.fedlora.adapters.peft_cases import PEFT_CASES

ALONE = {"OSF": "has no client axis", "Lily": "has no client axis"}
"""PEFT methods whose gradients pass through hooks of their own, or whose layers look at other rows."""


def members_of(worker: Worker, clients: int) -> list[Member]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for client in worker.federation.clients[:clients]:
        state = {
            key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in worker.initial.items()
        }
        found.append(worker.member(state, [client], 1, client))
    return found


def assert_equal(one: Trained, other: Trained, tolerance: float = 1e-4) -> None:
    assert one.failure is other.failure is None
    assert one.loss == pytest.approx(other.loss, abs=1e-4)
    for key, value in one.state.items():
        assert float((value - other.state[key]).abs().max()) <= tolerance, key


@pytest.mark.parametrize("case", [name for name in PEFT_CASES if name not in ALONE])
def test_a_cohort_is_its_clients_alone_for_every_peft_adapter(tiny: Compose, tmp_path: Path, case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of sparse tensors and missing CUDA kernels
        settings = [*PEFT_CASES[case].settings, "client.local_steps=2", "client.optimizer=sgd", "client.lr=0.01"]
        worker = Worker(Federation(tiny(*settings)), ClientStore(tmp_path))
        assert worker.share_steps() is None
        members = members_of(worker, 3)
        together = worker.trainer.train(members)
        worker.trainer.axis = None
        alone = worker.trainer.train(members)
    for one, other in zip(together, alone, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("case", ALONE)
def test_a_layer_without_a_client_axis_is_found_out(tiny: Compose, tmp_path: Path, case: str) -> None:
    worker = Worker(Federation(tiny(*PEFT_CASES[case].settings)), ClientStore(tmp_path))
    assert ALONE[case] in str(worker.share_steps())
    before = worker.model.read(worker.model.trainable)
    assert all(torch.equal(before[key], value) for key, value in worker.initial.items())


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_size_of_a_cohort_changes_nothing(tiny: Compose, tmp_path: Path, size: int) -> None:
    worker = Worker(Federation(tiny("client.local_epochs=2")), ClientStore(tmp_path))
    assert worker.share_steps() is None
    members = members_of(worker, 9)
    assert len({len(member.rows) for member in members}) > 3
    found = [t for start in range(0, len(members), size) for t in worker.trainer.train(members[start : start + size])]
    worker.trainer.axis = None
    for one, other in zip(found, worker.trainer.train(members), strict=True):
        assert_equal(one, other)


def test_the_order_of_a_cohort_changes_nothing(tiny: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny()), ClientStore(tmp_path))
    assert worker.share_steps() is None
    members = members_of(worker, 6)
    forward, backward = worker.trainer.train(members), worker.trainer.train(members[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        assert_equal(one, other, 1e-5)


class SmallMemory(Classification):
    """Runs out of memory with more than eight rows in a step, as a GPU would."""

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if len(batch["target"]) > 8:
            raise torch.OutOfMemoryError("more than eight rows")
        return super().row_losses(model, batch)


def test_a_cohort_that_does_not_fit_is_cut_in_two(tiny: Compose, tmp_path: Path) -> None:
    found = {}
    for task in ("classification", f"{__file__}:SmallMemory"):
        worker = Worker(Federation(tiny(f"task.name={task}")), ClientStore(tmp_path / str(len(found))))
        assert worker.share_steps() is None
        found[task] = worker.trainer.train(members_of(worker, 7))
        assert (worker.trainer.halved > 0) == (task != "classification")
    for one, other in zip(*found.values(), strict=True):
        assert_equal(one, other)


def test_a_client_that_does_not_fit_alone_fails_alone(tiny: Compose, tmp_path: Path) -> None:
    settings = [f"task.name={__file__}:SmallMemory", "client.batch_size=12", "engine.packing=false"]
    worker = Worker(Federation(tiny(*settings)), ClientStore(tmp_path))
    assert worker.share_steps() is None
    members = members_of(worker, 9)
    for member, result in zip(members, worker.trainer.train(members), strict=True):
        assert (result.failure is not None) == (len(member.rows) > 8)
        assert result.failure is None or "lower client.batch_size" in result.failure


def test_frozen_layers_run_once_for_all_clients(tiny: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny("client.local_steps=1")), ClientStore(tmp_path))
    assert worker.share_steps() is None
    calls: list[int] = []
    blocks = worker.model.packer.blocks
    assert blocks is not None
    hook = blocks[0].intermediate.register_forward_hook(lambda *call: calls.append(1))  # type: ignore[union-attr]
    worker.trainer.train(members_of(worker, 9))
    hook.remove()
    assert len(calls) == 1


def test_bf16_trains_what_is_trained_in_fp32(tiny: Compose, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = [f"precision={precision}", "client.local_epochs=3"]
        worker = Worker(Federation(tiny(*settings)), ClientStore(tmp_path / precision))
        assert worker.share_steps() is None
        assert worker.model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert {p.dtype for p in worker.model.parameters()} == {torch.float32}
        trained = worker.trainer.train([worker.member(worker.initial, [c], 1, c) for c in worker.federation.clients])
        assert all(value.dtype == torch.float32 for t in trained for value in t.state.values())
        losses[precision] = np.array([t.loss for t in trained])
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.05)
    assert not np.array_equal(losses["bf16"], losses["fp32"])
