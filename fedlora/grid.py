"""The seam between strategies and execution: a stack of Flower Grids.

strategy (ordinary fp32 arrays) -> :class:`CodecGrid` (packing, wire dtype) -> :class:`SetupGrid` (what is sent once)
-> :class:`fedlora.meter.MeterGrid` (the ledger) -> engine. Messages are logical: each is addressed to one client of the
round's cohort, whose node id is a hash of its client id, so any Flower strategy works and every engine counts the same
bytes.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedlora import validation, wire
from fedlora.errors import FedloraError
from fedlora.ledger import Ledger
from fedlora.ranks import crop
from fedlora.validation import ReplyRules, printable

CLIENT_ERROR = 2  # Flower's code for an exception in a ClientApp
NOT_NEEDED = "not needed: enough others answered"
"""Why the reply of a client is not used that has done nothing wrong."""


def node_of(client: str) -> int:
    """The logical node id of a client: 62 bits of a hash, the same in every run and on every engine."""
    return (1 << 62) | (int.from_bytes(hashlib.blake2b(client.encode(), digest_size=8).digest(), "big") >> 2)


def error_reply(request: Message, reason: str) -> Message:
    """The reply of a client that failed."""
    return Message(Error(CLIENT_ERROR, reason), reply_to=request)


def reason_of(reply: Message) -> str:
    """Why a client failed, as it says: one line."""
    return printable(reply.error.reason or "") or "no reason given"


def late(timeout: float | None) -> str:
    """Why there is no reply."""
    return "it did not answer" if timeout is None else f"late: no reply within {timeout:g} s"


@contextmanager
def collector_paused() -> Iterator[None]:
    """Work that makes many objects and no garbage: Python's collector would search the whole heap meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ClientGrid(Grid):
    """A Grid that knows which client a logical node is. Shows exactly the round's cohort to the strategy.

    Attributes:
        wanted: how many replies without an error are enough for the round, where time is real; ``None``: all.
        tls: whether clients are connected over TLS; the bytes of a simulation are counted as if they were.
    """

    tls = True

    def __init__(self) -> None:
        self._clients: dict[int, str] = {}
        self._cohort: tuple[int, ...] = ()
        self.server_round = 0
        self.wanted: int | None = None

    def begin_round(self, server_round: int, cohort: Sequence[str], wanted: int | None = None) -> None:
        """Set the clients that :meth:`get_node_ids` shows, and how many of their replies are enough."""
        self.server_round, self.wanted = server_round, wanted
        self._cohort = tuple(self.address(client) for client in cohort)

    def address(self, client: str) -> int:
        """The node id to send to ``client``."""
        node = node_of(client)
        self._clients[node] = client
        return node

    def meet(self, server_round: int, clients: Sequence[str], ledger: Ledger) -> dict[str, str]:
        """See that ``clients`` are there and agree to the run; returns why some cannot take part, by client."""
        return {}

    def client_of(self, node: int) -> str:
        """The client behind a node id."""
        return self._clients[node]

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of the round's cohort, in cohort order."""
        return list(self._cohort)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message (Flower's older way)."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def set_run(self, run: Run) -> None:
        """Unused: a run has one Grid."""

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return Run.create_empty(run_id=TaskIdentity.run_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send all messages and return a reply for each, both in cohort order; one that did not come is an error.

        Flower's strategies shuffle the nodes with the global random generator; without this order their sums, and
        so a run's bits, would depend on it.
        """
        place = {node: number for number, node in enumerate(self._cohort)}
        requests = sorted(messages, key=lambda message: place.get(message.metadata.dst_node_id, len(place)))
        replies = self.exchange(requests, timeout)
        by_request = {reply.metadata.reply_to_message_id: reply for reply in replies}
        return [by_request.get(r.metadata.message_id) or error_reply(r, late(timeout)) for r in requests]

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Do the work of :meth:`send_and_receive`; subclasses implement it.

        Whoever has not answered within ``timeout`` seconds is left out (``None``: all are waited for). In a simulation
        time is virtual, and engines wait for all.
        """
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refused: rounds are synchronous."""
        raise FedloraError("this Grid works in synchronous rounds: use send_and_receive in the strategy")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refused: rounds are synchronous."""
        raise FedloraError("this Grid works in synchronous rounds: use send_and_receive in the strategy")


class GridLayer(ClientGrid):
    """One layer of the stack: changes messages on the way down and replies on the way up."""

    def __init__(self, inner: ClientGrid) -> None:
        super().__init__()
        self.inner = inner
        self._clients = inner._clients

    def begin_round(self, server_round: int, cohort: Sequence[str], wanted: int | None = None) -> None:
        """Pass the cohort down the stack."""
        super().begin_round(server_round, cohort, wanted)
        self.inner.begin_round(server_round, cohort, wanted)

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Send what :meth:`down` makes of each request, and make replies with :meth:`up`."""
        with collector_paused():
            lower = [self.down(request) for request in requests]
        replies = {r.metadata.reply_to_message_id: r for r in self.inner.exchange(lower, timeout)}
        changed = []
        with collector_paused():
            for request in lower:
                # Taken out, so that a reply is gone once `up` has made another one of it: never two of every client's.
                reply = replies.pop(request.metadata.message_id, None)
                if reply is not None:
                    changed.append(self.up(request, reply))
        return changed

    def down(self, request: Message) -> Message:
        """Change a message on its way to the client."""
        return request

    def up(self, request: Message, reply: Message) -> Message:
        """Change a reply on its way to the strategy."""
        return reply


class CodecGrid(GridLayer):
    """Packs arrays into one buffer of the wire dtype, and checks and unpacks what comes back.

    A reply that is not what it should be (:mod:`fedlora.validation`) becomes an error of that client. A client of
    smaller rank gets, and gives, the leading part of every factor.
    """

    def __init__(
        self,
        inner: ClientGrid,
        layout: Callable[[str], wire.Layout],
        answer: Callable[[str, tuple[str, ...]], wire.Layout],
        dtype: str,
        rules: ReplyRules = ReplyRules(),  # noqa: B008  it cannot change
    ) -> None:
        """Names and shapes: ``layout`` of what goes to a client, ``answer`` of what comes back.

        ``answer`` gets the factors that the client was asked to train, none for all of them. ``rules``: what else a
        reply must be.
        """
        super().__init__(inner)
        self.layout, self.answer = layout, answer
        self.dtype, self.rules = dtype, rules
        self._packed: dict[tuple[Any, ...], tuple[ArrayRecord, ArrayRecord]] = {}
        self._states: dict[int, dict[str, Tensor]] = {}  # what was packed, where updates are measured
        self._sent = 0

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Pack what is sent to many clients once."""
        try:
            return super().exchange(requests, timeout)
        finally:
            self._packed.clear()
            self._states.clear()

    def down(self, request: Message) -> Message:
        """Pack the arrays (a record once for all clients of one layout) and address the message to its client."""
        content = RecordDict()
        client = self.client_of(request.metadata.dst_node_id)
        for name, record in request.content.items():
            if isinstance(record, ArrayRecord):
                record = self._pack(record, self.layout(client) if name == "arrays" else None)
            content[name] = ConfigRecord(dict(record)) if isinstance(record, ConfigRecord) else record
        cast(ConfigRecord, content["config"])["client-id"] = client
        packed = Message(content, request.metadata.dst_node_id, request.metadata.message_type)
        self._sent += 1
        for message in (request, packed):
            message.metadata.__dict__["_message_id"] = f"{self._sent:064x}"
        return packed

    def up(self, request: Message, reply: Message) -> Message:
        """Unpack into ordinary arrays, or turn the reply into an error that says what is wrong with it."""
        if reply.has_error():
            return error_reply(request, reason_of(reply))
        try:
            return Message(self.checked(request, reply), reply_to=request)
        except FedloraError as error:
            return error_reply(request, f"refused reply: {error}")

    def checked(self, request: Message, reply: Message) -> RecordDict:
        """What of a reply the strategy sees.

        Raises:
            FedloraError: it cannot be used.
        """
        asked = request.content.config_records["config"]
        client = self.client_of(request.metadata.dst_node_id)
        layout = None if asked.get("personal", False) else self.answer(client, parts_of(asked))

        sent = self._states.get(id(request.content.get("arrays")), {})
        return validation.trained(reply, self.rules, layout, self.dtype, sent)

    def _pack(self, record: ArrayRecord, layout: wire.Layout | None) -> ArrayRecord:
        """``record`` cropped to ``layout`` in the wire dtype, or whole in fp32 where there is no layout."""
        key = (id(record), None if layout is None else tuple(layout.values()))
        if key not in self._packed:
            state = wire.from_record(record)
            state = state if layout is None else crop(state, layout)
            packed = wire.pack(state, "fp32" if layout is None else self.dtype)
            self._packed[key] = (record, packed)  # the record too: another one must not get its id
            if self.rules.max_update_norm is not None:
                self._states[id(packed)] = state
        return self._packed[key][1]


def parts_of(instructions: Mapping[str, Any]) -> tuple[str, ...]:
    """The factors that a message asks to train, and so the ones that its reply holds; none: all."""
    return tuple(str(part) for part in instructions.get("train", ()))


class SetupGrid(GridLayer):
    """Adds what a client must receive once (a basis) until the client has answered, and again when it has changed."""

    def __init__(self, inner: ClientGrid, setup: Mapping[str, Tensor], delivered: Iterable[str] = ()) -> None:
        super().__init__(inner)
        self.setup = wire.pack(setup) if setup else None
        self.delivered = set(delivered)

    def replace(self, setup: Mapping[str, Tensor]) -> None:
        """From now on every client needs ``setup``, and none has it."""
        self.setup = wire.pack(setup)
        self.delivered.clear()

    def down(self, request: Message) -> Message:
        """Attach the setup where it is missing."""
        if self.setup is not None and self.client_of(request.metadata.dst_node_id) not in self.delivered:
            request.content["setup"] = self.setup
        return request

    def up(self, request: Message, reply: Message) -> Message:
        """Remember who has it; a client that failed may have lost it."""
        client = self.client_of(request.metadata.dst_node_id)
        (self.delivered.discard if reply.has_error() else self.delivered.add)(client)
        return reply
