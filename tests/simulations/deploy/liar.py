"""A client that trains honestly and then sends something else: ``python liar.py SERVER ID ROWS BACKBONE HOME``."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from fedlora.deploy.client import DeployedClient, Home
from fedlora.deploy.executor import Executor
from fedlora.deploy.supernode import SuperNode
from fedlora.wire import PACKED, STYPE

LIES = ("not finite", "a shape too small", "a pickle", "too much", "raises")


class Liar(DeployedClient):
    """Tells another lie in every round, in the order of ``LIES``."""

    def handle(self, message: Message) -> Message:
        """The honest answer, spoilt."""
        reply = super().handle(message)
        if message.metadata.message_type != "train" or reply.has_error():
            return reply
        kind = LIES[(int(message.content.config_records["config"]["server-round"]) - 1) % len(LIES)]  # type: ignore[arg-type]
        if kind == "raises":
            raise RuntimeError("a client that raises")
        count = len(reply.content.array_records["arrays"][PACKED].data) // 4
        numbers = np.full({"a shape too small": count - 1, "too much": 50 * count}.get(kind, count), np.nan, np.float32)
        data = pickle.dumps(LIES) if kind == "a pickle" else numbers.tobytes()
        array = Array(dtype="float32", shape=(len(numbers),), stype=STYPE, data=data)
        reply.content["arrays"] = ArrayRecord({PACKED: array})
        return reply


if __name__ == "__main__":
    server, client, rows, backbone, folder = sys.argv[1:]
    home = Home(Path(folder), client, rows, backbone=backbone)
    home.folder.mkdir(parents=True)
    node = SuperNode(server, home.folder, None, None)
    executor = Executor(node.tasks, Liar(home))
    while True:
        executor.start_next()
        time.sleep(0.2)
