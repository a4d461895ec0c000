"""``fedlora join``: one real client, from its own rows to the server, until it is stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from fedlora.deploy.client import DeployedClient, Home
from fedlora.deploy.code import code_hash
from fedlora.deploy.executor import Executor
from fedlora.deploy.keys import fingerprint, public_key_of
from fedlora.deploy.supernode import SuperNode
from fedlora.errors import FedloraError

log = logging.getLogger("fedlora")
POLL_SECONDS = 0.25
PATIENT = 20.0
"""Seconds after which a client that is not connected says so."""
PATIENCE = 150.0
"""Seconds after which a SuperNode that does not get in is given up. A server notices after a minute that a client is
gone, and does not let it in again before."""


def join(
    server: str,
    home: Home,
    root_certificates: Path | None,
    key: Path | None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve ``server`` as the client of ``home`` until interrupted.

    Args:
        server: ``host:port`` of the server.
        home: the client's own.
        root_certificates: that the server's certificate is checked with; ``None``: no encryption at all.
        key: the client's private key; ``None``: the server cannot know who this is.
        say: told what happens, in sentences.

    Raises:
        FedloraError: the server cannot be reached, or does not let this client in.
    """
    client = DeployedClient(home)
    audit = client.guard.audit
    said = None if key is None else fingerprint(public_key_of(key))
    audit.write(
        "joined", server=server, client=home.client, key=said, code=code_hash(), policy=home.policy.model_dump()
    )
    node = SuperNode(server, home.folder, root_certificates, key)
    executor = Executor(node.tasks, client)
    failing_since: float | None = None
    told, started = "", time.monotonic()
    try:
        while True:
            if executor.start_next():
                failing_since = None
                continue
            now = time.monotonic()
            if not node.process.running:
                failing_since = failing_since or now
                reason = node.why()
                if now - failing_since > PATIENCE:
                    raise FedloraError(f"No connection to {server}: {reason}.")
                if reason != told:
                    say(f"no connection to {server} yet: {reason}")
                    told = reason
                time.sleep(5.0)
                node.process.start()
            elif not told and now - started > PATIENT and not node.connected:
                told = node.why()
                say(f"no connection to {server} yet: {told}")
            time.sleep(POLL_SECONDS)
    finally:
        node.stop()
        audit.write("left", server=server)
