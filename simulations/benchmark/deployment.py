"""What a deployed round costs beside training: ``python -m simulations.benchmark.deployment [--rounds 8]``.

One real client of MiniLM, with a process of its own, trains one step a round; server and client are on this machine.
The first round is not counted: it loads the libraries of training. Of a message it prints the seconds in which the
client fetched it from its SuperNode, answered it (training included) and handed the answer over, and of a round the
seconds from sending to the last reply. What is left of a round is Flower's: a SuperNode looks for messages every three
seconds. ``--plain`` has Flower start a new process for every message instead, as ``flower-supernode`` does by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedlora.deploy.processes import free_port
from simulations.compose import compose_config
from simulations.split import split

SETTINGS = [
    "method=fedit", "partition=iid", "partition.clients=2", "data.limit=200", "data.split.unseen_clients=0.5",
    "data.split.public_rows=0", "client.local_steps=1", "engine.threads=1", "eval.every=1000", "tracking=none",
    "cohort.size=null",
]  # fmt: skip
HANDLED = re.compile(r"train: fetched in ([\d.]+) s, answered in ([\d.]+) s, handed over in ([\d.]+) s")


def main(argv: Sequence[str] | None = None) -> int:
    """Print medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="Flower's own SuperNode: a process for every message")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rounds, parts = measure(Path(folder), options.rounds, options.plain)
    print(f"round:       {_of(rounds)}")
    for name, values in zip(("fetched", "answered", "handed over"), zip(*parts, strict=True), strict=False):
        print(f"{name + ':':12s} {_of(values)}")
    return 0


def measure(folder: Path, rounds: int, plain: bool) -> tuple[list[float], list[list[float]]]:
    """Seconds of every round after the first, and what the client has measured of each of its messages."""
    split(compose_config(SETTINGS), folder / "silos")
    (rows,) = [path for path in (folder / "silos").iterdir() if path.stem != "server"]
    port, run = free_port(), folder / "run"
    # The server keeps no rows of its own: nothing is evaluated.
    server = ["serve", *SETTINGS, "data=csv", "data.labels=[fresh,rotten]", f"rounds={rounds + 1}", f"run_dir={run}"]
    server += ["--insecure", "--clients", rows.stem, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0"}
    client = [sys.executable, "-m", "simulations.cli", "join", f"127.0.0.1:{port}", "--insecure", "--id", rows.stem]
    client += ["--data", str(rows), "--home", str(folder / "home")]
    if plain:
        own = f"client-id='{rows.stem}' data='{rows}' home='{folder / 'home'}'"
        client = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
        client += ["--node-config", own]
    log = folder / "client.log"
    serve = [sys.executable, "-m", "simulations.cli", *server]
    with _process(serve, folder / "server.log", environment) as serving, _process(client, log, environment):
        if serving.wait() != 0:
            raise RuntimeError((folder / "server.log").read_text() + log.read_text())
        time.sleep(1.0)
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    parts = [[float(number) for number in found] for found in HANDLED.findall(log.read_text())]
    return [record["seconds"]["train"] for record in records[2:]], parts[1:]


@contextmanager
def _process(command: Sequence[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _of(values: Sequence[float]) -> str:
    return f"{statistics.median(values):6.2f} s (of {len(values)}: {min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    raise SystemExit(main())
