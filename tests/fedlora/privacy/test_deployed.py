"""A deployed client's noise cannot be drawn again from the configuration and the message; a simulated one's can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlora import wire
from fedlora.client import Worker, instruct
from fedlora.federation import Federation
from fedlora.grid import node_of
from fedlora.protocol import CLIP, NOISE
from fedlora.store import ClientStore
from tests.conftest import Compose
from tests.fedlora.helpers import request

RECORD = ["privacy=record", "privacy.clip=0.5", "client.optimizer=sgd", "client.lr=0.1", "client.local_steps=1"]
CLIENT = ["privacy=client", "privacy.clip=0.5", "privacy.noise_multiplier=1.0", "privacy.noise=clients",
          "strategy.weighting=uniform"]  # fmt: skip


def released(tiny: Compose, folder: Path, settings: list[str], deployed: bool) -> Tensor:
    """What a client sends, in one piece: a worker of its own, the same configuration and the same message."""
    worker = Worker(Federation(tiny("method=ffa", *settings)), ClientStore(folder), deployed)
    client = worker.federation.clients[0]
    message = request(node_of(client), wire.pack(worker.model.read(worker.model.shared)))
    asked = {CLIP: 0.5, NOISE: 0.5} if settings is CLIENT else {}
    message.content["config"] = instruct(client, 1, **asked)
    reply = worker.handle(message)
    sent = wire.unpack(reply.content.array_records["arrays"], worker.layout(client), "fp32")
    return torch.cat([value.flatten() for value in sent.values()])


@pytest.mark.parametrize("settings", [RECORD, CLIENT], ids=["record", "client"])
def test_the_noise_of_a_deployed_client_cannot_be_drawn_again(
    tiny: Compose, tmp_path: Path, settings: list[str]
) -> None:
    simulated = [released(tiny, tmp_path / f"simulated {i}", settings, deployed=False) for i in range(2)]
    deployed = [released(tiny, tmp_path / f"deployed {i}", settings, deployed=True) for i in range(2)]
    assert simulated[0].equal(simulated[1])
    for one, other in [deployed, (simulated[0], deployed[0]), (simulated[0], deployed[1])]:
        assert (one != other).all()  # every number has noise of its own
