"""How long it takes from the start of a process to its first step: ``python -m simulations.benchmark.startup``.

New processes run the demonstration's model and data up to one step of one client, without an evaluation and without
Ray. Caches are warm: the first process is not counted. Seconds since the process was started, medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

PROCESS = """
import sys, time
started = float(sys.argv[1])
def reached(): print(time.time() - started, time.process_time(), flush=True)
from simulations.commands import run
from simulations.compose import compose_config
import simulations.simulate
reached()
import tempfile
from flwr.app import ConfigRecord, Message, RecordDict
from fedlora import wire
from fedlora.client import worker_for
from fedlora.federation import Federation
from fedlora.grid import node_of
from simulations.engines.build import build_engine
from simulations.engines.choose import settle
folder = tempfile.mkdtemp()
config = compose_config(["method=fedit", "client.local_steps=1"])
federation = Federation(config)
federation.rows
reached()
worker = worker_for(config.model_dump_json(), folder)
reached()
settle(worker)
client = federation.clients[0]
record = ConfigRecord({"server-round": 1, "client-id": client})
content = RecordDict({"config": record, "arrays": wire.pack(worker.model.read(worker.model.shared))})
with build_engine(worker) as grid:
    (reply,) = grid.exchange([Message(content, node_of(client), "train")], None)
assert not reply.has_error(), reply.error
reached()
"""
STAGES = ("imports done", "data ready", "model ready", "first step done")


def run_once() -> list[list[float]]:
    """``[seconds, CPU seconds]`` at every stage of one new process."""
    command = [sys.executable, "-c", PROCESS, str(time.time())]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [[float(number) for number in line.split()] for line in lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Print one row a stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=3)
    options = parser.parse_args(argv)
    run_once()
    processes = [run_once() for _ in range(options.processes)]
    for place, stage in enumerate(STAGES):
        wall, cpu = (statistics.median(process[place][kind] for process in processes) for kind in (0, 1))
        print(f"{stage:16s} {wall:6.2f} s ({cpu:.2f} s CPU)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
