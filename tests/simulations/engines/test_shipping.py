"""What is shipped arrives as it was: values, formats, identity; and only what is trained is copied."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedlora.client import Worker
from fedlora.federation import Federation
from fedlora.store import ClientStore
from fedlora.tasks.classification import Classification
from simulations.engines.shipping import SMALL, Parcel, ship, unship
from tests.conftest import Compose

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.uint8]


class Mine(Classification):
    """A user's own task."""

    answer = 42


def over_the_wire(parcel: Parcel) -> Parcel:
    """The parcel as another process reads it: arrays that nobody may write to."""
    copy = Parcel(*pickle.loads(pickle.dumps(tuple(parcel))))
    for array in copy.arrays:
        array.flags.writeable = False
    return copy


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans())
def test_a_tensor_keeps_its_values_format_and_shape(dtype: torch.dtype, shape: list[int], turned: bool) -> None:
    tensor = torch.arange(int(np.prod(shape))).remainder(3).to(dtype).reshape(shape)
    tensor = tensor.mT if turned and tensor.ndim > 1 else tensor
    found = unship(over_the_wire(ship({"t": tensor})))["t"]
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("size", [0, 1, SMALL, SMALL + 1])
def test_an_array_of_any_size_keeps_its_values(size: int) -> None:
    array = np.arange(size, dtype=np.uint8)
    parcel = ship([array, array])
    assert len(parcel.arrays) == (size > SMALL)
    one, two = unship(over_the_wire(parcel))
    assert one is two
    np.testing.assert_array_equal(one, array)


def test_what_two_objects_share_is_shipped_once_and_still_shared() -> None:
    module = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    module[1].weight = module[0].weight
    state = {"a": torch.ones(1000)}
    parcel = ship((module, [state] * 5, {"again": state["a"]}))
    assert sum(array.nbytes for array in parcel.arrays) == 4 * (64 + 8 + 8 + 1000)
    found, states, other = unship(over_the_wire(parcel))
    assert found[0].weight is found[1].weight
    assert all(each is states[0] for each in states)
    assert other["again"] is states[0]["a"]


def test_frozen_tensors_share_the_memory_of_the_parcel_and_trained_ones_are_copies() -> None:
    frozen, trained = nn.Parameter(torch.ones(50), requires_grad=False), nn.Parameter(torch.ones(50))
    written = torch.ones(50)
    parcel = ship([frozen, trained, written], {id(written)})
    found = unship(parcel)
    places = [array.ctypes.data for array in parcel.arrays]
    assert [tensor.data_ptr() == place for tensor, place in zip(found, places, strict=True)] == [True, False, False]
    assert [type(tensor) for tensor in found] == [nn.Parameter, nn.Parameter, torch.Tensor]
    assert [tensor.requires_grad for tensor in found] == [False, True, False]
    with torch.no_grad():
        found[1].add_(1), found[2].add_(1)
    assert all((array.view(np.float32) == 1).all() for array in parcel.arrays)


def test_the_memory_of_a_trainer_is_shared_except_for_what_it_trains(tiny: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny("method=fed_sb", "adapter.basis=weight")), ClientStore(tmp_path))
    parcel = ship(worker.trainer, {id(tensor) for tensor in worker.model.loadable()})
    trainer = unship(over_the_wire(parcel))
    own = {tensor.data_ptr() for tensor in trainer.model.loadable()}
    frozen = [tensor for tensor in trainer.model.module.parameters() if tensor.data_ptr() not in own]
    assert len(frozen) > 20
    assert len(pickle.dumps(parcel.pickled)) < 500_000
    shared = unship(parcel).model.module.state_dict()
    again = unship(parcel).model.module.state_dict()
    same = {name for name, tensor in shared.items() if tensor.data_ptr() == again[name].data_ptr() and tensor.numel()}
    assert sum(shared[name].nbytes for name in same) > 0.9 * sum(tensor.nbytes for tensor in shared.values())


def test_a_shipped_trainer_gives_the_same_bits(tiny: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny(f"task.name={__file__}:Mine")), ClientStore(tmp_path))
    assert worker.share_steps() is None
    members = [worker.member(worker.initial, [client], 1, client) for client in worker.federation.clients[:3]]
    parcel = over_the_wire(ship(worker.trainer, {id(tensor) for tensor in worker.model.loadable()}))
    there = unship(parcel)
    assert there.task.answer == 42
    found = there.train(unship(over_the_wire(ship(members))))
    for one, two in zip(worker.trainer.train(members), found, strict=True):
        assert one.loss == two.loss
        assert all(torch.equal(value, two.state[key]) for key, value in one.state.items())


@pytest.fixture
def quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes' own
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_backbone_trains_there_as_here(tiny: Compose, tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    worker = Worker(Federation(tiny(f"backbone.quantization={quantization}")), ClientStore(tmp_path))
    worker.share_steps()
    members = [worker.member(worker.initial, [client], 1, client) for client in worker.federation.clients[:2]]
    there = unship(over_the_wire(ship(worker.trainer, {id(tensor) for tensor in worker.model.loadable()})))
    for one, two in zip(worker.trainer.train(members), there.train(members), strict=True):
        assert one.failure is two.failure is None
        assert all(torch.equal(value, two.state[key]) for key, value in one.state.items())
