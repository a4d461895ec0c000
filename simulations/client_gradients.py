"""The start that needs gradients of clients: asked for once, before round 1, and summed on the server.

The cohort of round 1 is asked, so that nobody is who would not take part anyway. Its messages are those of round 0 in
the ledger, and the gradients, as large as all adapted weights, are setup bytes on their way up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedlora import validation, wire
from fedlora.adapters import State
from fedlora.grid import ClientGrid, CodecGrid
from fedlora.protocol import GRADIENTS


class GradientGrid(CodecGrid):
    """Addresses the requests, and checks and unpacks the gradients that come back, which are fp32 on any wire."""

    def __init__(self, inner: ClientGrid, layout: wire.Layout) -> None:
        """``layout``: ``{module: (m, n)}`` of the adapted weights."""
        super().__init__(inner, lambda client: {}, lambda client, parts: layout, "fp32")
        self._gradients = layout

    def checked(self, request: Message, reply: Message) -> RecordDict:
        """The gradients as ordinary arrays."""
        return RecordDict({"gradients": wire.TensorRecord(validation.gradients(reply, self._gradients))})


def ask(grid: ClientGrid, clients: Sequence[str], deadline: float | None = None) -> list[Message]:
    """Ask ``clients`` for the gradients of their rows, as round 0; returns their replies, errors among them."""
    grid.begin_round(0, clients)
    requests = [
        Message(
            RecordDict({"config": ConfigRecord({"server-round": 0, GRADIENTS: True})}),
            grid.address(client),
            MessageType.TRAIN,
        )
        for client in clients
    ]
    return grid.send_and_receive(requests, timeout=deadline)


def summed(replies: Sequence[Message]) -> State:
    """The sum of the usable gradients ``{module: [m, n]}``, in the order of the clients and in fp64."""
    total: State = {}
    for reply in replies:
        if not reply.has_error():
            for name, value in wire.from_record(cast(ArrayRecord, reply.content["gradients"])).items():
                total[name] = total.get(name, torch.zeros(())) + value.double()
    return {name: value.float() for name, value in total.items()}
