"""The ledger of a deployed run against the bytes on the sockets of its clients."""

from __future__ import annotations

import math
import socket
import time
from contextlib import suppress

import pytest

from fedlora.ledger import Ledger
from fedlora.transport import Traffic
from tests.fedlora.wiretap import Proxy
from tests.simulations.deploy.conftest import MakeDeployment

POLL, HEARTBEAT, HANDSHAKE = Traffic(150, 898), Traffic(174, 913), Traffic(1950, 600)  # over TLS
ONCE = Traffic(3000, 6500)  # to be let in, to leave, and to fetch the app
REQUEST = 15  # bytes by which the address of loopback, ids and a signature may be shorter than is counted


def listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.mark.slow
def test_what_passes_is_the_ledger_and_what_no_message_causes(make: MakeDeployment) -> None:
    deployment = make(encrypted=True)
    server = deployment.serve()
    server.wait_until(lambda: listens(deployment.port))
    proxy, start = Proxy(deployment.port), time.time()
    deployment.port = proxy.port
    deployment.join_all()
    assert server.wait() == 0, server.said
    seconds = time.time() - start
    deployment.stop()
    proxy.close()
    ledger, seen = Ledger.read(deployment.run / "ledger.parquet"), proxy.between(0, math.inf)
    said, clients = ledger.totals(), len(deployment.clients)
    polls, beats = clients * (seconds / 3 + 5), clients * (seconds / 30 + 1)
    for way in ("down", "up"):
        idle = polls * getattr(POLL, way) + beats * getattr(HEARTBEAT, way) + clients * getattr(ONCE, way)
        idle += len(proxy.opened) * getattr(HANDSHAKE, way)
        missing = 15 * len(ledger.entries) // 2 * REQUEST if way == "up" else 0
        assert said[f"transport_{way}"] - missing < getattr(seen, way) < said[f"transport_{way}"] + idle
