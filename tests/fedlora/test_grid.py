from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedlora import wire
from fedlora.errors import FedloraError
from fedlora.grid import CodecGrid, SetupGrid, error_reply, node_of
from fedlora.ledger import Ledger
from fedlora.meter import MeterGrid
from fedlora.transport import transport_bytes
from tests.fedlora.helpers import Engine, assert_same, echo, reply, request, serialised_bytes

LAYOUT = {"m.lora_B.weight": (3, 2), "m.lora_A.weight": (2, 5)}
COHORT = ("zoe", "adam", "mia")
SETUP = {"m.basis": torch.arange(6.0)}


def numbers(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in LAYOUT.items()}


class Stack:
    """The whole stack on an engine that runs ``answer`` for every client."""

    def __init__(
        self, answer: Callable[[Message], Message] = echo, dtype: str = "fp32", setup=None, delivered=()
    ) -> None:
        self.engine = Engine(answer)
        self.ledger = Ledger()
        self.setup = SetupGrid(MeterGrid(self.engine, self.ledger), setup or {}, delivered)
        self.grid = CodecGrid(self.setup, lambda client: LAYOUT, lambda client, parts: LAYOUT, dtype)

    def round(self, server_round: int = 1, cohort: tuple[str, ...] = COHORT, arrays: ArrayRecord | None = None):
        self.grid.begin_round(server_round, cohort)
        record = wire.to_record(numbers()) if arrays is None else arrays
        return list(self.grid.send_and_receive([request(node, record) for node in self.grid.get_node_ids()]))

    def client(self, message: Message) -> str:
        return self.grid.client_of(message.metadata.src_node_id)


def only(client: str, answer: Callable[[Message], Message]) -> Callable[[Message], Message]:
    """An honest cohort but for one client."""
    return lambda message: answer(message) if message.metadata.dst_node_id == node_of(client) else echo(message)


def state_reply(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Message], Message]:
    return lambda message: reply(message, wire.pack(change(numbers())))


def with_number(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state["m.lora_A.weight"][1, 3] = value
        return state

    return change


def raw_reply(content: RecordDict) -> Callable[[Message], Message]:
    return lambda message: Message(content, reply_to=message)


def metrics(**values: object) -> RecordDict:
    return RecordDict(
        {"arrays": wire.pack(numbers()), "metrics": MetricRecord({k.replace("_e", "-e"): v for k, v in values.items()})}
    )


LIES = {
    "nan": (state_reply(with_number(math.nan)), "'m.lora_A.weight' holds numbers that are not finite"),
    "infinite": (state_reply(with_number(-math.inf)), "not finite"),
    "too few tensors": (state_reply(lambda state: {"m.lora_B.weight": state["m.lora_B.weight"]}), "expected 64 bytes"),
    "huge": (state_reply(lambda state: {**state, "more": torch.zeros(10**6)}), "expected 64 bytes"),
    "other type": (lambda message: reply(message, wire.pack(numbers(), "bf16")), "got bfloat16"),
    "unpacked": (lambda message: reply(message, wire.to_record(numbers())), "expected one packed array"),
    "no arrays": (lambda message: reply(message, None), "no 'arrays' record"),
    "arrays of another kind": (
        raw_reply(
            RecordDict({"arrays": ConfigRecord(), "metrics": MetricRecord({"num-examples": 1, "train_loss": 0.1})})
        ),
        "'arrays' is a ConfigRecord",
    ),
    "no metrics": (raw_reply(RecordDict({"arrays": wire.pack(numbers())})), "no 'metrics' record"),
    "metrics of another kind": (
        raw_reply(RecordDict({"arrays": wire.pack(numbers()), "metrics": ConfigRecord()})),
        "'metrics' is a ConfigRecord, not a MetricRecord",
    ),
    "no examples": (raw_reply(metrics(num_examples=0, train_loss=0.1)), "num-examples is 0"),
    "negative examples": (raw_reply(metrics(num_examples=-5, train_loss=0.1)), "num-examples is -5"),
    "fractional examples": (raw_reply(metrics(num_examples=0.5, train_loss=0.1)), "num-examples is 0.5"),
    "listed examples": (raw_reply(metrics(num_examples=[1, 2], train_loss=0.1)), "num-examples is"),
    "nan loss": (raw_reply(metrics(num_examples=3, train_loss=math.nan)), "train_loss is nan"),
    "error": (lambda message: error_reply(message, "out of memory"), "out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_client_that_fails_or_lies_costs_only_its_own_update(lie: str):
    answer, reason = LIES[lie]
    stack = Stack(only("adam", answer))
    replies = stack.round()
    assert [stack.client(message) for message in replies] == list(COHORT)
    assert [message.has_error() for message in replies] == [False, True, False]
    assert reason in replies[1].error.reason
    for message in (replies[0], replies[2]):
        assert_same(wire.from_record(message.content.array_records["arrays"]), numbers())


def test_a_client_that_never_answers_costs_only_its_own_update():
    stack = Stack()
    everyone = stack.engine.exchange
    stack.engine.exchange = lambda requests, timeout: everyone(requests, timeout)[1:]  # type: ignore[method-assign]
    replies = stack.round()
    assert [stack.client(message) for message in replies] == list(COHORT)
    assert [message.has_error() for message in replies] == [False, False, True]
    assert replies[2].error.reason == "it did not answer"
    (row,) = [entry for entry in stack.ledger.entries if entry.client == "mia" and entry.direction == "up"]
    assert (row.payload, row.setup, row.message, row.status) == (0, 0, 0, "it did not answer")


def test_a_deadline_reaches_the_engine_and_who_misses_it_is_late():
    stack = Stack()
    everyone, seen = stack.engine.exchange, []

    def exchange(requests: list[Message], timeout: float | None) -> list[Message]:
        seen.append(timeout)
        return everyone(requests, timeout)[:2]

    stack.engine.exchange = exchange  # type: ignore[method-assign]
    stack.grid.begin_round(1, COHORT)
    record = wire.to_record(numbers())
    replies = stack.grid.send_and_receive([request(n, record) for n in stack.grid.get_node_ids()], timeout=2.5)
    assert seen == [2.5]
    assert replies[0].error.reason == "late: no reply within 2.5 s"
    assert stack.ledger.entries[-1].status == "late: no reply within 2.5 s"


def test_replies_come_back_in_cohort_order_whatever_order_the_engine_has():
    for cohort in (COHORT, COHORT[::-1]):
        stack = Stack()
        assert [stack.client(message) for message in stack.round(cohort=cohort)] == list(cohort)
        assert [stack.client(message) for message in stack.engine.answers] == list(cohort[::-1])
    assert Engine().send_and_receive([]) == []


def test_messages_go_out_in_cohort_order_whatever_order_the_strategy_has():
    stack = Stack()
    stack.grid.begin_round(1, COHORT)
    record = wire.to_record(numbers())
    replies = stack.grid.send_and_receive([request(node_of(client), record) for client in ("mia", "adam", "zoe")])
    assert [stack.grid.client_of(m.metadata.dst_node_id) for m in stack.engine.requests] == list(COHORT)
    assert [stack.client(message) for message in replies] == list(COHORT)


def test_a_reply_carries_the_update_of_its_own_client():
    def answer(message: Message) -> Message:
        client = str(message.content.config_records["config"]["client-id"])
        return reply(message, wire.pack(numbers(len(client))), examples=len(client))

    stack = Stack(answer)
    for message in stack.round():
        seed = len(stack.client(message))
        assert message.content.metric_records["metrics"]["num-examples"] == seed
        assert_same(wire.from_record(message.content.array_records["arrays"]), numbers(seed))


def test_every_message_names_its_client_and_keeps_the_instructions():
    stack = Stack()
    stack.grid.begin_round(1, COHORT)
    record = wire.to_record(numbers())
    stack.grid.send_and_receive([request(node, record, lr=0.5) for node in stack.grid.get_node_ids()])
    records = [message.content.config_records["config"] for message in stack.engine.requests]
    assert [record["client-id"] for record in records] == list(COHORT)
    assert all(record["lr"] == 0.5 and record["server-round"] == 1 for record in records)


def test_a_strategy_sees_exactly_the_cohort_of_the_round():
    stack = Stack()
    stack.grid.begin_round(1, ("a", "b", "c"))
    stack.grid.begin_round(2, ("c", "d"))
    assert [stack.grid.client_of(node) for node in stack.grid.get_node_ids()] == ["c", "d"]
    assert stack.engine.get_node_ids() == stack.grid.get_node_ids()
    assert stack.grid.client_of(node_of("a")) == "a"


def test_node_ids_are_stable_and_positive_in_64_bits():
    nodes = {node_of(f"client {i}") for i in range(1000)}
    assert len(nodes) == 1000
    assert all(0 < node < 2**63 for node in nodes)


# The codec --------------------------------------------------------------------------------------------------------


def test_a_broadcast_is_packed_once_and_equal_for_all():
    stack = Stack()
    stack.round()
    records = [message.content.array_records["arrays"] for message in stack.engine.requests]
    assert all(record is records[0] for record in records)
    assert records[0][wire.PACKED].data == wire.pack(numbers())[wire.PACKED].data


def test_separate_records_of_equal_numbers_are_packed_to_equal_bytes():
    stack = Stack()
    stack.grid.begin_round(1, COHORT)
    stack.grid.send_and_receive([request(node, wire.to_record(numbers())) for node in stack.grid.get_node_ids()])
    assert len({m.content.array_records["arrays"][wire.PACKED].data for m in stack.engine.requests}) == 1


def test_each_client_gets_the_numbers_addressed_to_it():
    stack = Stack()
    stack.grid.begin_round(1, COHORT)
    records = [wire.to_record(numbers(seed)) for seed in (1, 2, 1)]
    records[2] = records[0]  # back to the first one after another: no stale packing
    nodes = stack.grid.get_node_ids()
    stack.grid.send_and_receive([request(node, record) for node, record in zip(nodes, records, strict=True)])
    for message, seed in zip(stack.engine.requests, (1, 2, 1), strict=True):
        assert_same(wire.unpack(message.content.array_records["arrays"], LAYOUT), numbers(seed))


def test_a_broadcast_of_the_next_round_is_not_the_last_one():
    stack = Stack()
    stack.round(1)
    stack.round(2, arrays=wire.to_record(numbers(8)))
    assert_same(wire.unpack(stack.engine.requests[-1].content.array_records["arrays"], LAYOUT), numbers(8))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_strategy_sees_fp32_whatever_travels(dtype: str):
    stack = Stack(dtype=dtype)
    replies = stack.round()
    sent = stack.engine.requests[0].content.array_records["arrays"]
    assert wire.tensor_bytes(sent) == 16 * wire.DTYPES[dtype].itemsize
    expected = {key: value.to(wire.DTYPES[dtype]).float() for key, value in numbers().items()}
    for message in replies:
        arrays = message.content.array_records["arrays"]
        assert {array.dtype for array in arrays.values()} == {"float32"}
        assert_same(wire.from_record(arrays), expected)


def test_corrections_and_setup_travel_in_fp32_whatever_the_wire_type():
    stack = Stack(dtype="bf16", setup=SETUP)
    stack.grid.begin_round(1, ("a",))
    message = request(stack.grid.get_node_ids()[0], wire.to_record(numbers()))
    message.content["correction"] = wire.to_record({"c": torch.tensor([1.0000001])})
    stack.grid.send_and_receive([message])
    (sent,) = stack.engine.requests
    assert_same(wire.unpack(sent.content.array_records["correction"], {"c": (1,)}), {"c": torch.tensor([1.0000001])})
    assert_same(wire.unpack(sent.content.array_records["setup"], {"m.basis": (6,)}), SETUP)


def test_the_strategys_own_message_is_not_changed():
    stack = Stack(setup=SETUP)
    stack.grid.begin_round(1, ("a",))
    message = request(stack.grid.get_node_ids()[0], wire.to_record(numbers()))
    stack.grid.send_and_receive([message])
    assert set(message.content) == {"config", "arrays"}
    assert "client-id" not in message.content.config_records["config"]
    assert_same(wire.from_record(message.content.array_records["arrays"]), numbers())


def test_a_client_that_trains_alone_sends_no_arrays_and_is_not_refused():
    stack = Stack(lambda message: reply(message, None))
    stack.grid.begin_round(1, ("a",))
    (answer,) = stack.grid.send_and_receive([request(stack.grid.get_node_ids()[0], personal=True)])
    assert not answer.has_error()


# Setup ------------------------------------------------------------------------------------------------------------


def setups(stack: Stack, since: int = 0) -> list[bool]:
    return ["setup" in message.content for message in stack.engine.requests[since:]]


def test_setup_travels_once_to_every_client():
    stack = Stack(setup=SETUP)
    stack.round(1, ("a", "b"))
    stack.round(2, ("b", "c", "a"))
    assert setups(stack) == [True, True, False, True, False]
    assert stack.setup.delivered == {"a", "b", "c"}


def test_setup_travels_again_after_a_failed_reply():
    broken = {"b"}
    stack = Stack(
        lambda m: error_reply(m, "gone") if stack.engine.client_of(m.metadata.dst_node_id) in broken else echo(m),
        setup=SETUP,
    )
    stack.round(1, ("a", "b"))
    stack.round(2, ("a", "b"))
    broken.clear()
    stack.round(3, ("a", "b"))
    broken.add("a")
    stack.round(4, ("a", "b"))
    broken.clear()
    stack.round(5, ("a", "b"))
    assert setups(stack) == [True, True, False, True, False, True, False, False, True, False]


def test_setup_travels_again_to_a_client_that_never_answered():
    stack = Stack(setup=SETUP)
    everyone = stack.engine.exchange
    stack.engine.exchange = lambda requests, timeout: everyone(requests, timeout)[:0]  # type: ignore[method-assign]
    stack.round(1, ("a",))
    stack.engine.exchange = everyone  # type: ignore[method-assign]
    stack.round(2, ("a",))
    assert setups(stack) == [True, True]


def test_a_resumed_run_remembers_who_has_the_setup():
    stack = Stack(setup=SETUP, delivered=["a"])
    stack.round(1, ("a", "b"))
    assert setups(stack) == [False, True]


def test_without_a_setup_nothing_is_attached():
    stack = Stack()
    stack.round()
    assert setups(stack) == [False, False, False]


# The ledger -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_ledger_holds_the_bytes_of_the_messages(dtype: str):
    stack = Stack(only("adam", lambda message: error_reply(message, "out of memory\nat line 3")), dtype, SETUP)
    for server_round in (1, 2):
        stack.round(server_round)
    down = [entry for entry in stack.ledger.entries if entry.direction == "down"]
    up = [entry for entry in stack.ledger.entries if entry.direction == "up"]
    assert [entry.client for entry in down] == [entry.client for entry in up] == list(COHORT) * 2
    assert [entry.round for entry in down] == [entry.round for entry in up] == [1, 1, 1, 2, 2, 2]
    assert [entry.message for entry in down] == [serialised_bytes(message) for message in stack.engine.requests]
    answers = [*reversed(stack.engine.answers[:3]), *reversed(stack.engine.answers[3:])]
    assert [entry.message for entry in up] == [serialised_bytes(message) for message in answers]
    fetched = [transport_bytes(message, "down") for message in stack.engine.requests]
    sent = [transport_bytes(message, "up") for message in answers]
    assert [entry.transport for entry in down] == [one.down + two.down for one, two in zip(fetched, sent, strict=True)]
    assert [entry.transport for entry in up] == [one.up + two.up for one, two in zip(fetched, sent, strict=True)]
    payload = 16 * wire.DTYPES[dtype].itemsize
    assert [entry.payload for entry in down] == [payload] * 6
    assert [entry.payload for entry in up] == [payload, 0, payload] * 2
    assert [entry.setup for entry in down] == [24, 24, 24, 0, 24, 0]
    assert [entry.setup for entry in up] == [0] * 6
    assert [entry.status for entry in up] == ["ok", "out of memory at line 3", "ok"] * 2


def test_a_message_that_nobody_answers_has_travelled():
    stack = Stack()
    sent: list[Message] = []
    stack.engine.exchange = lambda requests, timeout: sent.extend(requests) or []  # type: ignore[method-assign]
    stack.round()
    assert [entry.direction for entry in stack.ledger.entries] == ["down", "down", "down", "up", "up", "up"]
    assert {entry.message for entry in stack.ledger.entries[3:]} == {0}
    fetched = [transport_bytes(message, "down") for message in sent]
    assert stack.ledger.totals()["transport_up"] == sum(one.up for one in fetched) > 0
    assert stack.ledger.totals()["transport_down"] == sum(one.down for one in fetched)


def test_a_correction_counts_as_payload():
    stack = Stack()
    stack.grid.begin_round(1, ("a",))
    message = request(stack.grid.get_node_ids()[0], wire.to_record(numbers()))
    message.content["correction"] = wire.to_record({"c": torch.zeros(5)})
    stack.grid.send_and_receive([message])
    assert stack.ledger.entries[0].payload == 64 + 20


def test_a_fed_sb_message_is_hardly_larger_than_its_payload():
    layout: dict[str, tuple[int, ...]] = {
        f"encoder.layer.{i}.attention.self.query.lora_R.weight": (32, 32) for i in range(12)
    }
    layout |= {"classifier.weight": (2, 384), "classifier.bias": (2,)}
    state = {key: torch.randn(shape) for key, shape in layout.items()}
    ledger = Ledger()
    grid = CodecGrid(
        SetupGrid(MeterGrid(Engine(), ledger), {}), lambda client: layout, lambda client, parts: layout, "fp32"
    )
    grid.begin_round(12345, ["Royal Infirmary of Edinburgh, ward 17"])
    grid.send_and_receive([request(node, wire.to_record(state)) for node in grid.get_node_ids()])
    assert len(ledger.entries) == 2
    for entry in ledger.entries:
        assert entry.payload == 4 * (12 * 32 * 32 + 770)
        assert entry.payload < entry.message <= entry.payload + max(0.02 * entry.payload, 1024)


# Flower's interface -----------------------------------------------------------------------------------------------


def test_asynchronous_use_is_refused():
    grid = Stack().grid
    with pytest.raises(FedloraError, match="send_and_receive"):
        grid.push_messages([])
    with pytest.raises(FedloraError, match="send_and_receive"):
        grid.pull_messages([])


def test_flowers_older_way_of_making_messages_works():
    grid = Stack().grid
    message = grid.create_message(RecordDict({"config": ConfigRecord()}), "train", node_of("a"), "1")
    assert message.metadata.dst_node_id == node_of("a")
