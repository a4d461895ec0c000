"""What real clients can send that Flower's own code cannot read, or that says it answers something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import wire
from fedlora.deploy.client import IDENTITY
from fedlora.deploy.terms import TERMS, Terms
from fedlora.grid import NOT_NEEDED, CodecGrid, SetupGrid, reason_of
from fedlora.ledger import Ledger
from fedlora.meter import MeterGrid
from simulations.deploy import grid as deployed
from simulations.deploy.grid import UNREADABLE, DeployedGrid
from tests.fedlora.helpers import assert_same, request
from tests.fedlora.test_hostile import LAYOUT, STATE

OURS = Terms("run", "{}", (), ("bad", "good"), "1", 1, "b", "t", "m")
CLIENTS = ("adam", "mia", "zoe")
Answer = Callable[[Message], Message | Exception | None]


def agreed(client: str, **more: str) -> RecordDict:
    return RecordDict({IDENTITY: ConfigRecord({"client-id": client, **more}), TERMS: OURS.record()})


def honest(message: Message) -> Message:
    metrics = MetricRecord({"num-examples": 3, "train_loss": 0.25})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


class Link:
    """Stands for Flower's grid: nodes 1, 2, ... are the clients; each answers its messages by a function.

    What is handed out is gone, all of it where one reply cannot be read, as with Flower.
    """

    def __init__(self, training: dict[str, Answer], meeting: dict[str, RecordDict]) -> None:
        self.training, self.meeting = training, meeting
        self.messages: dict[str, Message] = {}

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=number, status="online", last_activated_at="now", name=client)
            for number, client in enumerate(CLIENTS, 1)
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identifiers = []
        for message in messages:
            identifiers.append(f"id {len(self.messages)}")
            message.metadata.__dict__["_message_id"] = identifiers[-1]
            self.messages[identifiers[-1]] = message
        return identifiers

    def pull_messages(self, identifiers: Iterable[str]) -> list[Message]:
        answers = [self._answer(self.messages[identifier]) for identifier in identifiers]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if isinstance(answer, Message)]

    def _answer(self, message: Message) -> Message | Exception | None:
        client = CLIENTS[message.metadata.dst_node_id - 1]
        if TERMS in message.content:
            return Message(self.meeting.get(client, agreed(client)), reply_to=message)
        return self.training.get(client, honest)(message)


def round_of(
    training: dict[str, Answer], meeting: dict[str, RecordDict] | None = None, **more: Any
) -> tuple[list[Message], dict[str, str], Ledger]:
    """The replies of a round in cohort order, who could not be met, and the ledger."""
    ledger = Ledger()
    engine = DeployedGrid(Link(training, meeting or {}), OURS, CLIENTS, True, lambda: None)  # type: ignore[arg-type]
    grid = CodecGrid(
        SetupGrid(MeterGrid(engine, ledger), {}), lambda client: LAYOUT, lambda client, parts: LAYOUT, "fp32"
    )
    absent = engine.meet(1, CLIENTS, ledger)
    grid.begin_round(1, [client for client in CLIENTS if client not in absent], more.get("wanted"))
    messages = [request(node, wire.to_record(STATE)) for node in grid.get_node_ids()]
    return grid.send_and_receive(messages, timeout=more.get("timeout")), absent, ledger


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "POLL_SECONDS", 0.001)


def lying(message: Message) -> Message:
    reply = honest(message)
    reply.metadata.__dict__["_reply_to_message_id"] = "id 4"  # of another client
    reply.metadata.__dict__["_src_node_id"] = 3
    return reply


def of_arrays(message: Message) -> Message:
    reply = honest(message)
    reply.__dict__["_content"] = ArrayRecord()
    return reply


@pytest.mark.parametrize("error", UNREADABLE)
def test_a_reply_that_flower_cannot_read_costs_only_its_client(error: type[Exception]) -> None:
    replies, _, ledger = round_of({"mia": lambda message: error("as Flower says")})
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert reason_of(replies[1]) == f"its reply cannot be read ({error.__name__})"
    assert [entry.status for entry in ledger.entries if entry.round == 1][-3:].count("ok") == 2
    for reply in (replies[0], replies[2]):
        assert_same(wire.from_record(reply.content.array_records["arrays"]), STATE)


def test_a_reply_with_content_of_another_kind_costs_only_its_client() -> None:
    replies, _, _ = round_of({"mia": of_arrays})
    assert [reply.has_error() for reply in replies] == [False, True, False]


def test_a_reply_counts_for_the_message_that_was_sent_whatever_it_says() -> None:
    replies, _, _ = round_of({"adam": lying})
    assert [reply.has_error() for reply in replies] == [False, False, False]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (agreed("adam", refused=""), "no reason given"),
        (agreed("adam", refused="no\nround 9: all is well\x1b" + "x" * 10**5), "no round 9: all is well"),
        (agreed("zoe"), "its key is that of 'adam'"),
        (agreed("x" * 10**6), "it calls itself 'xxx"),
        (RecordDict({IDENTITY: MetricRecord(), TERMS: MetricRecord()}), "the terms of the run are incomplete"),
        (RecordDict(), "the terms of the run are incomplete"),
    ],
)  # fmt: skip
def test_a_client_that_says_nonsense_when_it_is_met_costs_only_itself(said: RecordDict, reason: str) -> None:
    replies, absent, ledger = round_of({}, {"adam": said})
    assert [reply.has_error() for reply in replies] == [False, False]
    assert list(absent) == ["adam"]
    (row,) = [entry for entry in ledger.entries if entry.direction == "up" and entry.status != "ok"]
    assert len(row.client) <= 500
    assert "\n" not in row.status
    assert reason in row.status + absent["adam"]


def test_a_round_ends_when_enough_have_answered_and_the_others_have_not_failed() -> None:
    replies, _, _ = round_of({"mia": lambda message: None}, wanted=2)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert reason_of(replies[1]) == NOT_NEEDED


def test_a_round_ends_at_its_deadline() -> None:
    started = time.monotonic()
    replies, _, ledger = round_of({"mia": lambda message: None}, timeout=0.05)
    assert time.monotonic() - started >= 0.05
    assert reason_of(replies[1]) == "late: no reply within 0.05 s"
    assert ledger.entries[-1].status == "late: no reply within 0.05 s"


@cache
def on_the_wire() -> dict[str, bytes]:
    """The objects that Flower makes of a reply, the whole of it last."""
    message = request(5, wire.pack(STATE), name="x", some=[1, 2])
    message.metadata.__dict__["_message_id"] = "f" * 64
    return {key: thing.deflate() for key, thing in get_all_nested_objects(honest(message)).items()}


BYTES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=500)
@given(BYTES)
def test_whatever_bytes_come_flower_reads_them_or_raises_what_we_expect(changes: list[tuple[int, int, int]]) -> None:
    contents = {key: bytearray(content) for key, content in on_the_wire().items()}
    for number, place, byte in changes:
        content = list(contents.values())[number % len(contents)]
        content[place % len(content)] = byte
    whole = list(contents)[-1]
    try:
        inflate_object_from_contents(whole, {key: bytes(content) for key, content in contents.items()})
    except UNREADABLE:
        return
