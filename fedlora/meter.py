"""The layer of the stack of Grids that counts: every message as it goes to the engine and comes back."""

from __future__ import annotations

from flwr.app import ArrayRecord, Message

from fedlora import wire
from fedlora.grid import ClientGrid, GridLayer, late, reason_of
from fedlora.ledger import Entry, Ledger
from fedlora.transport import transport_bytes


class MeterGrid(GridLayer):
    """Writes one ledger entry for every message: payload, setup, the length of the serialised message, and transport.

    A message travels both ways (see :mod:`fedlora.transport`): what fetching it sends up is counted with the reply, and
    what the server says to the reply is counted with the message. So the sums up and down are those of the socket.
    """

    def __init__(self, inner: ClientGrid, ledger: Ledger) -> None:
        super().__init__(inner)
        self.ledger, self.tls = ledger, inner.tls

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Record replies that never came, too: no bytes but what fetching the message has sent, and why."""
        replies = super().exchange(requests, timeout)
        answered = {reply.metadata.reply_to_message_id for reply in replies}
        for request in requests:
            if request.metadata.message_id not in answered:
                client = self.client_of(request.metadata.dst_node_id)
                fetched = transport_bytes(request, "down", self.tls)
                self.ledger.add(Entry(self.server_round, client, "up", 0, 0, 0, fetched.up, late(timeout)))
        return replies

    def down(self, request: Message) -> Message:
        """Record the message to the client."""
        self._record(request, request, "down", transport_bytes(request, "down", self.tls).down)
        return request

    def up(self, request: Message, reply: Message) -> Message:
        """Record the reply."""
        fetched, sent = transport_bytes(request, "down", self.tls), transport_bytes(reply, "up", self.tls)
        status = reason_of(reply) if reply.has_error() else "ok"
        self._record(request, reply, "up", fetched.up + sent.up, status)
        self.ledger.acknowledge(self.client_of(request.metadata.dst_node_id), sent.down)
        return reply

    def _record(self, request: Message, message: Message, direction: str, transport: int, status: str = "ok") -> None:
        content = message.content if message.has_content() else {}
        sizes = {name: wire.tensor_bytes(r) for name, r in content.items() if isinstance(r, ArrayRecord)}
        setup = sizes.pop("setup", 0)
        self.ledger.add(
            Entry(
                round=self.server_round,
                client=self.client_of(request.metadata.dst_node_id),
                direction=direction,
                payload=sum(sizes.values()),
                setup=setup,
                message=wire.message_bytes(message),
                transport=transport,
                status=status[:200],
            )
        )
