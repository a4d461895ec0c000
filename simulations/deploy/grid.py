"""The deployed engine: logical messages travel to real clients over Flower's SuperLink.

A client is met before it is asked for anything: both sides compare their terms (:mod:`fedlora.deploy.terms`). Who is
not connected costs nobody any time, and a message to a client that was started again meanwhile is sent again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid
from google.protobuf.message import DecodeError

from fedlora import wire
from fedlora.deploy.client import IDENTITY
from fedlora.deploy.terms import TERMS, Terms
from fedlora.errors import FedloraError
from fedlora.grid import NOT_NEEDED, ClientGrid, error_reply, reason_of
from fedlora.ledger import Entry, Ledger
from fedlora.transport import transport_bytes
from fedlora.validation import printable

log = logging.getLogger("fedlora")
POLL_SECONDS = 0.25
MEETING_SECONDS = 600.0
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, DecodeError)
"""What Flower raises where the bytes of a message are none of its own."""
SENDINGS = 3
"""How often a message is sent to a client that is started again before it has answered."""


@dataclass
class Sent:
    """A message on its way.

    Attributes:
        request: the logical message.
        node: where it was sent.
        activated: when that node was last started.
        times: how often it was sent.
    """

    request: Message
    node: int
    activated: str
    times: int = 1


class DeployedGrid(ClientGrid):
    """Sends each logical message to the node of its client and names the reply after the logical client."""

    def __init__(
        self, grid: Grid, terms: Terms, clients: Sequence[str], authenticated: bool, on_reply: Callable[[], None]
    ) -> None:
        """Speak for a run.

        Args:
            grid: of Flower, for the run.
            terms: what clients must agree to.
            clients: who may take part.
            authenticated: whether the SuperLink knows nodes by their keys; if not, clients are who they say they are,
                and nothing is encrypted.
            on_reply: called after each reply.
        """
        super().__init__()
        self.grid, self.terms, self.population = cast(HttpGrid, grid), terms, tuple(clients)
        self.authenticated = self.tls = authenticated
        self.on_reply = on_reply
        self._node_of: dict[str, int] = {}
        self._refused: dict[tuple[int, str], tuple[str, str]] = {}

    # Who is there.

    def meet(self, server_round: int, clients: Sequence[str], ledger: Ledger) -> dict[str, str]:
        """Agree with those of ``clients`` that are connected and were not met before.

        Returns:
            Why some of ``clients`` cannot take part, by client.
        """
        met = set(self._node_of.values())
        strangers = [node for node in self._online().values() if node.node_id not in met and not self._why(node)]
        if strangers:
            self._greet(server_round, strangers, ledger)
        online = self._online()
        refused = dict(why for node in online.values() if (why := self._why(node)))
        missing = [client for client in clients if self._node_of.get(client) not in online]
        return {client: refused.get(client, "it is not connected") for client in missing}

    def connected(self) -> list[str]:
        """Those that are connected, by their names where Flower knows them."""
        return [node.name for node in self._online().values()]

    def _why(self, node: Any) -> tuple[str, str] | None:
        """Which client a node is and why it is refused, as long as nobody has started it again."""
        return self._refused.get((node.node_id, node.last_activated_at))

    def _online(self) -> dict[int, Any]:
        """Flower's description of every node that is connected, by its id."""
        return {node.node_id: node for node in self.grid.get_nodes() if node.status == "online"}

    def _greet(self, server_round: int, nodes: Sequence[Any], ledger: Ledger) -> None:
        """Send the terms to ``nodes`` and note who they are, or why they are refused."""
        record = self.terms.record()
        sent = {}
        for node in nodes:
            message = Message(RecordDict({TERMS: record}), node.node_id, MessageType.QUERY)
            (identifier,) = self.grid.push_messages([message])
            sent[identifier] = node, message
        deadline = time.monotonic() + MEETING_SECONDS
        while sent and time.monotonic() < deadline:
            for identifier, reply in self._replies({key: message for key, (_, message) in sent.items()}):
                node, message = sent.pop(identifier)
                self._answered(server_round, node, message, reply, ledger)
            time.sleep(POLL_SECONDS)
        for node, _ in sent.values():
            self._refuse(node, f"it did not answer within {MEETING_SECONDS:.0f} s", node.name)

    def _refuse(self, node: Any, reason: str, client: str) -> None:
        self._refused[node.node_id, node.last_activated_at] = client, reason

    def _answered(self, server_round: int, node: Any, message: Message, reply: Message, ledger: Ledger) -> None:
        client, status = printable(named(reply) or node.name), "ok"
        try:
            self._check(reply, client, node.name)
            self._node_of[client] = node.node_id
        except FedloraError as error:
            status = printable(str(error)) or "no reason given"
            self._refuse(node, status, client)
            log.warning("round %d: client '%s' is refused: %s", server_round, client or "?", status)
        fetched, sent = transport_bytes(message, "down", self.tls), transport_bytes(reply, "up", self.tls)
        for direction, travelled, said in (("down", message, "ok"), ("up", reply, status)):
            size, cost = wire.message_bytes(travelled), getattr(fetched, direction) + getattr(sent, direction)
            ledger.add(Entry(server_round, client or "?", direction, 0, 0, size, cost, said[:200]))

    def _check(self, reply: Message, client: str, registered: str) -> None:
        """See that everything in ``reply`` of ``client`` fits."""
        if reply.has_error():
            raise FedloraError(reason_of(reply))
        identity = reply.content.get(IDENTITY)
        if self.authenticated and client != registered:
            raise FedloraError(f"it calls itself '{client}', and its key is that of '{registered}'")
        if client not in self.population:
            raise FedloraError(f"it calls itself '{client}', which is none of the clients of this run")
        if isinstance(identity, ConfigRecord) and "refused" in identity:
            raise FedloraError(str(identity["refused"]))
        difference = self.terms.differing(Terms.from_record(reply.content.get(TERMS)))
        if difference is not None:
            raise FedloraError(f"the terms of the run: {difference}")

    # What is asked of them.

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Send the requests and wait for all replies, for as many as are wanted, or for ``timeout`` seconds.

        They are counted as they come, before they are checked.
        """
        online = self._online()
        waiting: dict[str, Sent] = {}
        replies: list[Message] = []
        for request in requests:
            node = self._node_of.get(self.client_of(request.metadata.dst_node_id))
            if node is None or node not in online:
                replies.append(error_reply(request, "it is not connected"))
                continue
            self._send(Sent(request, node, online[node].last_activated_at), waiting)
        deadline = None if timeout is None else time.monotonic() + timeout
        usable = 0
        while waiting and (deadline is None or time.monotonic() < deadline):
            for identifier, reply in self._replies({key: sent.request for key, sent in waiting.items()}):
                request = waiting.pop(identifier).request
                if reply.has_error():
                    replies.append(error_reply(request, reason_of(reply)))
                else:
                    replies.append(Message(reply.content, reply_to=request))
                usable += reply.has_content()
                self.on_reply()
            if self.wanted is not None and usable >= self.wanted:
                return [*replies, *(error_reply(sent.request, NOT_NEEDED) for sent in waiting.values())]
            self._send_again(waiting)
            time.sleep(POLL_SECONDS)
        return replies

    def _replies(self, waiting: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """What has come back for messages, by their ids in Flower.

        They are asked for one by one: Flower forgets what it hands out, so that a reply that cannot be read would take
        others with it; and what a reply says that it answers may not be true.
        """
        for identifier, message in waiting.items():
            try:
                found = list(self.grid.pull_messages([identifier]))
            except UNREADABLE as error:
                found = [error_reply(message, f"its reply cannot be read ({type(error).__name__})")]
            for reply in found[:1]:
                readable = reply.has_error() or (reply.has_content() and isinstance(reply.content, RecordDict))
                yield identifier, reply if readable else error_reply(message, "its reply holds nothing")

    def _send(self, sent: Sent, waiting: dict[str, Sent]) -> None:
        message = Message(sent.request.content, sent.node, sent.request.metadata.message_type)
        (identifier,) = self.grid.push_messages([message])
        waiting[identifier] = sent

    def _send_again(self, waiting: dict[str, Sent]) -> None:
        """Send once more what went to a node that has been started again since: the message is lost there."""
        online = self._online() if waiting else {}
        for identifier, sent in list(waiting.items()):
            node = online.get(sent.node)
            if node is not None and node.last_activated_at != sent.activated and sent.times < SENDINGS:
                del waiting[identifier]
                self._send(Sent(sent.request, sent.node, node.last_activated_at, sent.times + 1), waiting)


def named(reply: Message) -> str:
    """The client that ``reply`` says it is from, if it says so."""
    identity = reply.content.get(IDENTITY) if reply.has_content() else None
    client = identity.get("client-id") if isinstance(identity, ConfigRecord) else None
    return client if isinstance(client, str) else ""
