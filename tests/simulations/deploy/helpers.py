"""Real processes of a deployment: a server and its clients, on this machine, each ended by its id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.deploy.keys import make_client_key, make_server_certificates
from fedlora.deploy.processes import free_port

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}


class Running:
    """A ``fedlora`` command in the background, with everything that it prints in one file."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "simulations.cli", *arguments]
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=ENVIRONMENT)

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 240) -> int:
        """Its exit status."""
        return self.process.wait(seconds)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for ``condition`` while it runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)

    def stop(self) -> None:
        """End it as Ctrl-C would, by its id."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def kill(self) -> None:
        """End it at once, by its id."""
        self.process.kill()
        self.process.wait()


@dataclass
class Deployment:
    """Three clients, a server and their settings.

    Attributes:
        folder: for everything.
        backbone: where the weights are.
        files: rows by owner, the server's among them.
        settings: of the run, without data and engine.
        certificates: of the server and the clients; ``None``: none.
    """

    folder: Path
    backbone: Path
    files: dict[str, Path]
    settings: list[str]
    certificates: Path | None
    port: int = field(default_factory=free_port)
    processes: list[Running] = field(default_factory=list)

    @property
    def clients(self) -> list[str]:
        return sorted(set(self.files) - {"server"})

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def make_certificates(self) -> None:
        """For the server and every client."""
        assert self.certificates is not None
        make_server_certificates(self.certificates, ["localhost"])
        (self.certificates / "clients").mkdir()
        for client in self.clients:
            self.make_key(client)
            public = self.certificates / f"{client}.pub"
            public.rename(self.certificates / "clients" / public.name)

    def make_key(self, client: str) -> Path:
        assert self.certificates is not None
        make_client_key(self.certificates / client)
        return self.certificates / client

    def serve(self, *more: str) -> Running:
        """Start the server."""
        rows = ["data=csv", f"data.path={self.files['server']}", "data.client=client", "data.labels=[bad,good]"]
        safety = ["--insecure", "--clients", ",".join(self.clients)]
        if self.certificates is not None:
            safety = ["--certs", str(self.certificates)]
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        return self._started(
            "serve", "serve", *self.settings, f"backbone.path={self.backbone}", *rows, *safety, *address,
            f"run_dir={self.run}", *more,
        )  # fmt: skip

    def resume(self) -> Running:
        """Start the server again."""
        return self._started("resume", "resume", str(self.run))

    def join(self, client: str, *more: str, key: Path | None = None, ca: Path | None = None) -> Running:
        """Start a client."""
        safety = ["--insecure", "--id", client]
        if self.certificates is not None:
            key, ca = key or self.certificates / client, ca or self.certificates / "ca.crt"
            safety = ["--key", str(key), "--ca", str(ca)]
        return self._started(
            f"join-{client}", "join", f"localhost:{self.port}", "--data", str(self.files[client]), *safety,
            "--home", str(self.folder / f"home-{client}"), f"backbone.path={self.backbone}", *more,
        )  # fmt: skip

    def join_all(self) -> dict[str, Running]:
        """Start all clients."""
        return {client: self.join(client) for client in self.clients}

    def _started(self, name: str, *arguments: str) -> Running:
        running = Running(self.folder / "logs", f"{name}-{len(self.processes)}", *arguments)
        self.processes.append(running)
        return running

    def stop(self) -> None:
        """End everything that was started."""
        for process in reversed(self.processes):
            process.stop()
