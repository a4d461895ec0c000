"""Flower's own processes, as children of ours: started with a log file, ended by their id, ended when we are."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.errors import FedloraError

STOP_SECONDS = 10.0


class Child:
    """A Python module that runs as a process of its own until it is stopped, or this process ends."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], log_file: Path) -> None:
        """Start ``module`` with ``arguments``; what it prints is added to ``log_file``."""
        self.name, self.log_file = name, log_file
        self._command = [sys.executable, "-m", module, *arguments]
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(self.log_file.parent),
                start_new_session=True,  # an interrupt at the terminal is for us to handle
            )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    @property
    def said(self) -> str:
        """What it has logged since it was last started, without colours."""
        with self.log_file.open("rb") as log:
            log.seek(self._log_start)
            return re.sub(r"\x1b\[[0-9;]*m", "", log.read().decode(errors="replace"))

    def last_words(self, lines: int = 3) -> str:
        """The end of its log, for messages."""
        return " ".join(line.strip() for line in self.said.strip().splitlines()[-lines:])

    def require_running(self) -> None:
        """See that it runs.

        Raises:
            FedloraError: it has ended.
        """
        if not self.running:
            raise FedloraError(
                f"{self.name} has ended with status {self.process.returncode}; the end of {self.log_file}: "
                f"{self.last_words()}"
            )

    def stop(self) -> None:
        """End it, by its id."""
        if self.running:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def environment(home: Path) -> Mapping[str, str]:
    """Of Flower's processes: files under ``home``, no reports about use, and the id of the process to end with."""
    return {
        **os.environ,
        "FLWR_HOME": str(home / ".flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FEDLORA_PARENT": str(os.getpid()),
    }


def end_with_parent() -> None:
    """End this process as soon as the one that has started it ends, in whatever way."""
    parent = os.environ.get("FEDLORA_PARENT")

    def watch() -> None:
        while os.getppid() == int(parent or 0):
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_SECONDS)
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_secret(path: Path) -> bytes:
    """A secret from the operating system in a file that only this user can read; Flower reads the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = base64.b64encode(os.urandom(32))
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(text)
    return text
