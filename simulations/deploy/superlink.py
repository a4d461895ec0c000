"""Flower's SuperLink as a process that ends with ours: ``python -m simulations.deploy.superlink``.

A SuperLink has one port for three APIs: clients fetch and send messages by one, and whoever reaches the other two can
start runs and register keys. Here those two answer this machine only.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedlora.deploy.processes import Child, end_with_parent, new_secret
from fedlora.deploy.runtime import TaskQueue
from fedlora.errors import FedloraError

log = logging.getLogger("fedlora")
APP = Path(__file__).parent / "app" / "pyproject.toml"
OPEN = ("/v1/fleet/", "/health")
START_SECONDS = 60.0
Scope = dict[str, Any]


class SuperLink:
    """The SuperLink of a run, and the requests that only this machine may make of it."""

    def __init__(self, host: str, port: int, folder: Path, certificates: Path | None) -> None:
        """Start it, or start it again on what an earlier one has left in ``folder``.

        Args:
            host: address that it listens on.
            port: that it listens on.
            folder: for its database, log and secret.
            certificates: the folder of ``ca.crt``, ``server.pem`` and ``server.key``; ``None``: no encryption, and
                everybody is let in.

        Raises:
            FedloraError: it does not start.
        """
        secret_file = folder / "superlink.secret"
        self.secret = new_secret(secret_file)
        self.root_certificates = None if certificates is None else (certificates / "ca.crt").read_bytes()
        arguments = ["--host", host, "--port", str(port), "--isolation", "process"]
        arguments += ["--superexec-auth-secret-file", str(secret_file), "--database", str(folder / "superlink.db")]
        arguments += ["--disable-runtime-dependency-installation"]
        if certificates is None:
            arguments += ["--insecure"]
        else:
            arguments += ["--ssl-ca-certfile", str(certificates / "ca.crt"), "--enable-supernode-auth"]
            arguments += ["--ssl-certfile", str(certificates / "server.pem")]
            arguments += ["--ssl-keyfile", str(certificates / "server.key")]
        self.process = Child("Flower's SuperLink", "simulations.deploy.superlink", arguments, folder / "superlink.log")
        self.address = f"127.0.0.1:{port}"
        self.tasks = TaskQueue(self.address, "flwr-serverapp", self.secret, self.root_certificates)
        self._control = ControlHttpClient.from_server_address(
            server_address=self.address,
            insecure=certificates is None,
            root_certificates=self.root_certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep_running, name="superlink", daemon=True)
        try:
            self._wait()
        except BaseException:
            self.process.stop()
            raise
        self._keeper.start()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.process.require_running()
            with suppress(httpx.TransportError):
                self._control.ListNodes(ListNodesRequest())
                return
            time.sleep(0.2)
        raise FedloraError(f"Flower's SuperLink does not answer at {self.address}: {self.process.last_words()}")

    def register(self, keys: dict[str, bytes]) -> None:
        """Let in exactly the clients of ``keys`` (public keys by client id), and no other any more."""
        nodes = [node for node in self._control.ListNodes(ListNodesRequest()).nodes_info if not node.unregistered_at]
        known = {node.name: node for node in nodes}
        for client, node in known.items():
            if keys.get(client) != node.public_key:
                self._control.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
        for client, key in keys.items():
            if client not in known or known[client].public_key != key:
                self._control.RegisterNode(RegisterNodeRequest(public_key=key, name=client))

    def start_run(self) -> str:
        """Start a run of Flower and return the token of its server side."""
        content = build_fab_from_files({"pyproject.toml": APP})[0]
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        self._control.StartRun(StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto({})))
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            token = self.tasks.claim()
            if token is not None:
                return token
            time.sleep(0.1)
        raise FedloraError(f"Flower's SuperLink has not started the run: {self.process.last_words()}")

    def _keep_running(self) -> None:
        """Start it again on its database whenever it ends; clients and server try again meanwhile."""
        while not self._stopping.wait(0.5):
            if not self.process.running:
                log.warning("%s has ended and is started again: %s", self.process.name, self.process.last_words())
                self.process.start()

    def stop(self) -> None:
        """End it."""
        self._stopping.set()
        self._keeper.join()
        self.tasks.close()
        self._control.close()
        self.process.stop()


class ThisMachineOnly:
    """Middleware: whatever is not for clients is refused to everybody but this machine."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and not scope["path"].startswith(OPEN) and not _is_local(scope):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send)


def _is_local(scope: Scope) -> bool:
    host = (scope.get("client") or ("",))[0]
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def middleware() -> Sequence[Any]:
    """What Flower is given as the outermost layer."""
    from starlette.middleware import Middleware

    return [Middleware(ThisMachineOnly)]


if __name__ == "__main__":
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink

    end_with_parent()
    extensions.get_middleware = middleware  # Flower's own place for it
    flower_superlink()
