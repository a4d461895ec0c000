"""What a counting TCP proxy saw between one Flower SuperNode and the SuperLink of a small deployment on loopback.

``python -m tests.fedlora.wiretap`` prints it for three sizes of messages, plain, over TLS, and with a slow client.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.transport import Traffic

BIN = Path(sys.executable).parent

SERVER = """
import json, time
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from fedlora import transport, wire
app = ServerApp()

@app.main()
def main(grid, context):
    while not list(grid.get_node_ids()):
        time.sleep(0.5)
    node = next(iter(grid.get_node_ids()))
    with open(context.run_config["out"], "w") as out:
        for size in [0, *json.loads(context.run_config["sizes"])]:
            data = np.random.default_rng().bytes(size)
            array = Array(dtype="float32", shape=(size // 4,), stype=wire.STYPE, data=data)
            config = ConfigRecord({"server-round": 1, "client-id": "site a", "size": size})
            message = Message(RecordDict({"arrays": ArrayRecord({"packed": array}), "config": config}), node, "train")
            pulled, start = transport.transport_bytes(message, "down", context.run_config["tls"]), time.time()
            length = wire.message_bytes(message)
            (reply,) = grid.send_and_receive([message])
            end = time.time()
            pushed = transport.transport_bytes(reply, "up", context.run_config["tls"])
            row = {"size": size, "start": start, "end": end, "message": [length, wire.message_bytes(reply)],
                   "said": [pulled.down + pushed.down, pulled.up + pushed.up]}
            out.write(json.dumps(row) + "\\n")
            time.sleep(1.0)
"""

CLIENT = """
import time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    size = message.content["config"]["size"]
    time.sleep(context.run_config["seconds"])
    data = np.random.default_rng().bytes(size)
    array = Array(dtype="float32", shape=(size // 4,), stype="fedlora.packed", data=data)
    metrics = MetricRecord({"num-examples": 3, "train_loss": 0.25})
    return Message(RecordDict({"metrics": metrics, "arrays": ArrayRecord({"packed": array})}), reply_to=message)
"""

APP = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "wiretapped"
version = "1.0.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "wiretapped.server:app"
clientapp = "wiretapped.client:app"
[tool.flwr.app.config]
out = ""
sizes = "[]"
tls = false
seconds = 0
"""


@dataclass(frozen=True)
class Exchange:
    """One message and its reply: what they are long, what was said that they cost, and what passed meanwhile."""

    size: int
    message: Traffic
    said: Traffic
    seen: Traffic
    connections: int
    seconds: float


@dataclass
class Proxy:
    """Forwards connections to ``target`` on loopback and notes when how many bytes went ``down`` or ``up``."""

    target: int
    events: list[tuple[float, str, int]] = field(default_factory=list)
    opened: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):  # shut down
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._forward, args=(client,)))
                self._threads[-1].start()

    def _forward(self, client: socket.socket) -> None:
        with client, suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.target)) as server:
            self.opened.append(time.time())
            down = threading.Thread(target=self._pump, args=(server, client, "down"))
            down.start()
            self._pump(client, server, "up")
            down.join()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with suppress(OSError):  # one side has gone
            while data := source.recv(1 << 18):
                self.events.append((time.time(), direction, len(data)))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def between(self, start: float, end: float) -> Traffic:
        """Bytes that passed in this time."""
        passed = [(way, count) for when, way, count in self.events if start <= when < end]
        return Traffic(*(sum(count for way, count in passed if way == direction) for direction in ("down", "up")))

    def close(self) -> None:
        """Return when all connections have ended; both programs have."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def certificates(folder: Path) -> Path:
    """A test authority (``ca.crt``) and a certificate of it for loopback (``server.pem``, ``server.key``)."""
    folder.mkdir()
    (folder / "ext.cnf").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature,"
        "keyEncipherment\nextendedKeyUsage=serverAuth\nauthorityKeyIdentifier=keyid\n"
    )
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.crt -subj /CN=test-ca "
        "-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign",
        "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out server.pem -extfile ext.cnf",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


@contextmanager
def process(log: Path, env: dict[str, str], *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs until the block ends, in a session of its own."""
    with log.open("wb") as out:
        running = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], stdout=out, stderr=out, env=env, start_new_session=True
        )
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
            with suppress(ProcessLookupError):  # what it has started, such as its executor
                os.killpg(running.pid, signal.SIGKILL)


def wait_for(log: Path, text: str, seconds: float = 60) -> None:
    """Return when a program has written ``text``."""
    end = time.monotonic() + seconds
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < end, f"no '{text}' in {log}: {log.read_text()[-2000:]}"
        time.sleep(0.2)


def run_deployed(folder: Path, sizes: Sequence[int], tls: bool, seconds: int = 0) -> list[Exchange]:
    """Send messages of ``sizes`` bytes to one client, which answers with as many after ``seconds``."""
    home, app, out = folder / "flwr", folder / "app", folder / "rows.jsonl"
    (app / "wiretapped").mkdir(parents=True)
    home.mkdir()
    for name, text in (("server", SERVER), ("client", CLIENT), ("__init__", "")):
        (app / "wiretapped" / f"{name}.py").write_text(text)
    (app / "pyproject.toml").write_text(APP)
    port = free_port()
    proxy = Proxy(port)
    server, client, control = ["--insecure"], ["--insecure"], "insecure = true"
    if tls:
        certs = certificates(folder / "certs")
        server = ["--ssl-ca-certfile", f"{certs}/ca.crt", "--ssl-certfile", f"{certs}/server.pem"]
        server += ["--ssl-keyfile", f"{certs}/server.key"]
        client = ["--root-certificates", f"{certs}/ca.crt"]
        control = f'root-certificates = "{certs}/ca.crt"'
    (home / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\n{control}\n')
    env = dict(
        os.environ, FLWR_HOME=str(home), FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1",
        PATH=f"{BIN}:{os.environ['PATH']}", OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[2]),
    )  # fmt: skip
    link, node, run = (folder / f"{name}.log" for name in ("link", "node", "run"))
    common = ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    settings = f"out='{out}' sizes='{json.dumps(list(sizes))}' tls={str(tls).lower()} seconds={seconds}"
    with process(link, env, "flower-superlink", *server, *common, "--database", str(folder / "state.db")):
        wait_for(link, "Uvicorn running")
        address = ["--superlink", f"127.0.0.1:{proxy.port}", "--port", str(free_port())]
        with process(node, env, "flower-supernode", *client, *address, "--node-config", "partition-id=0"):
            wait_for(node, "SuperNode ID")
            with process(run, env, "flwr", "run", str(app), "here", "--stream", "-c", settings) as going:
                going.wait(300)
    proxy.close()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [
        Exchange(
            row["size"], Traffic(*row["message"]), Traffic(*row["said"]), proxy.between(row["start"], row["end"]),
            sum(row["start"] <= when < row["end"] for when in proxy.opened), row["end"] - row["start"],
        )
        for row in rows[1:]  # with the first message the client fetched the app
    ]  # fmt: skip


if __name__ == "__main__":
    three = [size for size in (10_240, 1 << 20, 12 << 20) for _ in range(3)]
    for name, tls, seconds in (("plain", False, 0), ("TLS", True, 0), ("TLS, slow client", True, 7)):
        with tempfile.TemporaryDirectory() as folder:
            for one in run_deployed(Path(folder), three, tls, seconds):
                print(name, one, flush=True)
