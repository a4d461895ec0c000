"""Clients announce what they are able to train: each is asked once, when the server first meets it.

The question is a message of Flower's type ``query`` and the answer one small record of settings. Both are rows of the
ledger, without payload, in the round in which the client is met. What is announced and cannot be served costs that
client only: it takes no part in the round, and is asked again in its next one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedlora import validation
from fedlora.capability import WHOLE, Capability, announced
from fedlora.errors import FedloraError
from fedlora.grid import ClientGrid, CodecGrid, reason_of
from fedlora.model import AdaptedModel
from fedlora.protocol import CAPABILITY


class AnnouncementGrid(CodecGrid):
    """Addresses the questions; answers hold no arrays."""

    def __init__(self, inner: ClientGrid) -> None:
        super().__init__(inner, lambda client: {}, lambda client, parts: {}, "fp32")

    def checked(self, request: Message, reply: Message) -> RecordDict:
        """The one record of the answer."""
        return RecordDict({CAPABILITY: validation.announcement(reply)})


class Capabilities:
    """What the server knows of its clients.

    Attributes:
        known: what each client that it has met can train.
    """

    def __init__(
        self,
        grid: ClientGrid,
        model: AdaptedModel,
        differences: Collection[str],
        known: Mapping[str, Capability],
        deadline: float | None = None,
    ) -> None:
        """Ask through ``grid``, and serve what ``model`` can.

        Args:
            grid: of the questions.
            model: of the run.
            differences: in what clients may differ; where that is nothing, nobody is asked.
            known: from a checkpoint.
            deadline: seconds that answers are waited for.
        """
        self.grid, self.model, self.differences = AnnouncementGrid(grid), model, differences
        self.known, self.deadline = dict(known), deadline

    def of(self, client: str) -> Capability:
        """What ``client`` is able to train: everything, where it was never asked."""
        return self.known.get(client, WHOLE)

    def meet(self, server_round: int, clients: Sequence[str]) -> dict[str, str]:
        """Ask those of ``clients`` that are new; returns why some of them cannot take part, by client."""
        strangers = [client for client in clients if client not in self.known] if self.differences else []
        if not strangers:
            return {}
        self.grid.begin_round(server_round, strangers)
        questions = [
            Message(
                RecordDict({"config": ConfigRecord({"server-round": server_round})}),
                self.grid.address(client),
                MessageType.QUERY,
            )
            for client in strangers
        ]
        refused = {}
        for reply in self.grid.send_and_receive(questions, timeout=self.deadline):
            client = self.grid.client_of(reply.metadata.src_node_id)
            try:
                self.known[client] = self._served(reply)
            except FedloraError as error:
                refused[client] = f"its announcement cannot be served: {error}"
        return refused

    def _served(self, reply: Message) -> Capability:
        if reply.has_error():
            raise FedloraError(reason_of(reply))
        capability = announced(reply.content.config_records[CAPABILITY], self.differences)
        self.model.adapter.require(capability)
        self.model.trains(capability=capability)
        return capability
