from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import wire
from fedlora.errors import FedloraError
from fedlora.grid import error_reply, node_of
from tests.fedlora.helpers import assert_same, serialised_bytes

DTYPES = st.sampled_from(list(wire.DTYPES))
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
LAYOUTS = st.dictionaries(st.text(max_size=8), SHAPES, max_size=5)
promise = settings(deadline=None, max_examples=60)


def random_numbers(layout: wire.Layout, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in layout.items()}


def packed(count: int, dtype: str = "fp32", seed: int = 0) -> ArrayRecord:
    return wire.pack(random_numbers({"x": (count,)}, seed), dtype)


def array(data: bytes, dtype: str = "float32", stype: str = wire.STYPE, shape: tuple[int, ...] = (3,)) -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


# Sizes ------------------------------------------------------------------------------------------------------------


@promise
@given(
    st.integers(0, 3000), DTYPES, st.text(min_size=1, max_size=20), st.integers(1, 10**6),
    st.lists(st.text(max_size=9)),
    st.one_of(st.none(), st.integers(1, 500)), st.one_of(st.none(), st.integers(1, 500)),
)  # fmt: skip
def test_message_bytes_of_a_request_is_its_serialised_length(
    count, dtype, client, server_round, pool, setup, correction
):
    config = ConfigRecord({"server-round": server_round, "client-id": client, "pool": pool, "personal": False})
    content = RecordDict({"arrays": packed(count, dtype), "config": config})
    if setup is not None:
        content["setup"] = packed(setup, seed=1)
    if correction is not None:
        content["correction"] = packed(correction, seed=2)
    message = Message(content, node_of(client), MessageType.TRAIN)
    assert wire.message_bytes(message) == serialised_bytes(message)


@promise
@given(
    st.integers(0, 3000),
    DTYPES,
    st.integers(0, 2**40),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(max_size=300),
)
def test_message_bytes_of_a_reply_is_its_serialised_length(count, dtype, examples, loss, failed, reason):
    request = Message(RecordDict({"config": ConfigRecord()}), node_of("a"), MessageType.TRAIN)
    request.metadata.__dict__["_message_id"] = "f" * 64
    metrics = MetricRecord({"num-examples": examples, "train_loss": loss})
    content = RecordDict({"metrics": metrics, "arrays": packed(count, dtype)})
    reply = error_reply(request, reason) if failed else Message(content, reply_to=request)
    assert wire.message_bytes(reply) == serialised_bytes(reply)


def test_what_a_stranger_makes_long_is_not_remembered():
    seen = []
    measure = wire.remembered(lambda name: seen.append(len(name)))
    for name in ("short", "short", "x" * 10**4, "x" * 10**4):
        measure(name)
    assert seen == [5, 10**4, 10**4]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_message_bytes_counts_every_chunk_of_a_large_array(extra: int):
    data = np.random.default_rng(0).bytes(2 * wire.CHUNK_BYTES + extra)
    content = RecordDict({"arrays": ArrayRecord({wire.PACKED: array(data)})})
    message = Message(content, node_of("a"), MessageType.TRAIN)
    assert wire.message_bytes(message) == serialised_bytes(message) > len(data)


def test_message_bytes_of_ordinary_flower_arrays_is_their_serialised_length():
    record = wire.to_record(random_numbers({"one": (3, 4), "two": (7,), "Ä": ()}))
    message = Message(RecordDict({"arrays": record, "empty": ArrayRecord()}), node_of("a"), MessageType.TRAIN)
    assert wire.message_bytes(message) == serialised_bytes(message)


def test_metering_does_not_change_the_message():
    message = Message(RecordDict({"arrays": packed(10)}), node_of("a"), MessageType.TRAIN)
    before = serialised_bytes(message)
    assert wire.message_bytes(message) == wire.message_bytes(message) == before
    assert wire.unpack(message.content.array_records["arrays"], {"x": (10,)})["x"].shape == (10,)


def test_tensor_bytes_are_the_bytes_of_the_numbers():
    assert [wire.tensor_bytes(packed(10, dtype)) for dtype in ("fp32", "fp16", "bf16")] == [40, 20, 20]


# Packing ----------------------------------------------------------------------------------------------------------


@promise
@given(LAYOUTS, DTYPES, st.integers(0, 1000))
def test_unpack_gives_back_what_pack_was_given(layout, dtype, seed):
    state = random_numbers(layout, seed)
    expected = {key: value.to(wire.DTYPES[dtype]).float() for key, value in state.items()}
    assert_same(wire.unpack(wire.pack(state, dtype), layout, dtype), expected)


def test_a_packed_record_carries_the_numbers_and_nothing_else():
    state = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3.0)}
    record = wire.pack(state)
    assert record[wire.PACKED].data == np.array([1, 2, 3], dtype="<f4").tobytes()
    assert json.dumps(list(record)) == '["packed"]'


def test_pack_takes_tensors_of_any_layout_and_type():
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    unpacked = wire.unpack(wire.pack(state), {"a": (3, 2), "b": (2,)})
    assert torch.equal(unpacked["a"], state["a"])
    assert torch.equal(unpacked["b"], torch.ones(2))


def test_what_was_unpacked_can_be_written_to():
    record = packed(3)
    first = wire.unpack(record, {"x": (3,)})["x"].clone()
    wire.unpack(record, {"x": (3,)})["x"].zero_()
    assert torch.equal(wire.unpack(record, {"x": (3,)})["x"], first)


@promise
@given(LAYOUTS)
def test_ordinary_records_give_back_what_they_were_given(layout):
    state = random_numbers(layout)
    assert_same(wire.from_record(wire.to_record(state)), state)


# Ordinary records that hold tensors ----------------------------------------------------------------------------------

STATE = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3.0)}


def plain(state: dict[str, torch.Tensor]) -> ArrayRecord:
    return ArrayRecord({key: Array(value.numpy()) for key, value in state.items()})


def test_a_record_of_tensors_is_read_without_arrays():
    record = wire.TensorRecord(STATE)
    assert (list(record), len(record), "a" in record, "c" in record) == (["b", "a"], 2, True, False)
    assert all(value is STATE[key] for key, value in wire.from_record(record).items())
    assert record.tensors is not None


@pytest.mark.parametrize(
    "ask",
    [
        lambda record: dict(record),
        lambda record: dict(record.items()),
        lambda record: list(record.values()),
        lambda record: record["a"],
        lambda record: record.copy(),
        lambda record: [array.tolist() for array in record.to_numpy_ndarrays()],
        lambda record: record.deflate(),
        lambda record: record.count_bytes(),
        lambda record: ArrayRecord(dict(record)),
        lambda record: (copy.deepcopy(record), record),
        lambda record: pickle.loads(pickle.dumps(record)),
    ],
)
def test_a_record_of_tensors_answers_like_one_of_arrays(ask):
    assert ask(wire.TensorRecord(STATE)) == ask(plain(STATE))


def test_a_record_of_tensors_can_be_changed_and_consumed_like_one_of_arrays():
    record, other = wire.TensorRecord(STATE), plain(STATE)
    for one in (record, other):
        one["c"] = Array(np.zeros(2))
        del one["b"]
        assert one.pop("a").numpy() == 3
    assert record == other
    assert record.to_numpy_ndarrays(keep_input=False)[0].tolist() == [0, 0]
    assert len(record) == 0
    assert wire.from_record(record) == {}


def test_a_copy_of_a_record_of_tensors_shares_no_memory_with_it():
    record = wire.TensorRecord({"x": torch.zeros(2)})
    copied = copy.deepcopy(record)
    wire.from_record(record)["x"].fill_(1.0)
    assert wire.from_record(copied)["x"].tolist() == [0, 0]


def test_a_record_for_a_strategy_is_a_copy_of_the_state():
    state = {"x": torch.zeros(2)}
    record = wire.to_record(state)
    state["x"].fill_(1.0)
    assert wire.from_record(record)["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (ArrayRecord(), "one packed array"),
        (ArrayRecord({"other": array(bytes(12))}), "one packed array"),
        (ArrayRecord({wire.PACKED: array(bytes(12)), "more": array(bytes(12))}), "one packed array"),
        (wire.to_record({wire.PACKED: torch.zeros(3)}), "one packed array"),
        (ArrayRecord({wire.PACKED: array(bytes(12), dtype="bfloat16")}), r"wire\.dtype fp32, got bfloat16"),
        (ArrayRecord({wire.PACKED: array(bytes(12), dtype="object")}), r"wire\.dtype fp32"),
        (packed(3, "fp16"), r"wire\.dtype fp32, got float16"),
        (packed(2), "expected 12 bytes for 1 tensors, got 8"),
        (packed(4), "expected 12 bytes for 1 tensors, got 16"),
        (packed(0), "expected 12 bytes for 1 tensors, got 0"),
        (ArrayRecord({wire.PACKED: array(bytes(11))}), "expected 12 bytes for 1 tensors, got 11"),
    ],
)
def test_a_record_that_does_not_fit_the_layout_is_refused(record: ArrayRecord, reason: str):
    with pytest.raises(FedloraError, match=reason):
        wire.unpack(record, {"x": (3,)})


def test_an_unexpected_array_is_refused_where_nothing_is_expected():
    assert wire.unpack(packed(0), {}) == {}
    with pytest.raises(FedloraError, match="expected 0 bytes"):
        wire.unpack(packed(1), {})


ANY_ARRAY = st.builds(
    array,
    data=st.binary(max_size=64),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "object", "<f4", ""]) | st.text(max_size=6),
    stype=st.sampled_from([wire.STYPE, "numpy.ndarray", ""]),
    shape=st.lists(st.integers(-3, 2**40), max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from([wire.PACKED, "x"]), ANY_ARRAY, max_size=2), LAYOUTS, DTYPES)
def test_unpack_gives_a_state_of_the_layout_or_refuses(arrays, layout, dtype):
    try:
        state = wire.unpack(ArrayRecord(arrays), layout, dtype)
    except FedloraError:
        return
    assert {key: tuple(value.shape) for key, value in state.items()} == layout
    assert all(value.dtype == torch.float32 for value in state.values())
