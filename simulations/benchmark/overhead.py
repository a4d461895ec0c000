"""What a round costs besides training: ``python -m simulations.benchmark.overhead [--clients 1000] [method ...]``.

The real round loop, strategy, codec, meter, ledger and checkpoints run on an engine that answers every request at once
with random numbers, at the sizes of the demonstration (MiniLM, LoRA of rank 8: 75 thousand numbers). Evaluation and the
engine are left out. Every number is milliseconds a client, each phase without the phases inside it.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora import wire
from fedlora.client import Worker, worker_for
from fedlora.grid import ClientGrid, GridLayer
from fedlora.meter import MeterGrid
from fedlora.seeding import torch_generator
from simulations import rounds
from simulations.compose import compose_config
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder
from strategies.build import build_strategy

METHODS = ("fedit", "ffa", "fed_sb", "fedex", "flora", "flexlora")
PHASES = ("select", "dispatch", "codec", "meter", "aggregate", "error", "record", "other")
LEFT_OUT = ("engine", "evaluate")


class InstantGrid(ClientGrid):
    """Answers every request at once with random numbers around what was sent first, other ones for every client."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.worker = worker
        self.dtype = worker.federation.config.wire.dtype

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """One reply a request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Message) -> Message:
        client = self.client_of(request.metadata.dst_node_id)
        generator = torch_generator(0, "benchmark", self.server_round, client)
        layout = self.worker.layout(client)
        state = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in layout.items()}
        examples = 1 + request.metadata.dst_node_id % 40
        metrics = MetricRecord({"num-examples": examples, "train_loss": 0.5})
        return Message(RecordDict({"metrics": metrics, "arrays": wire.pack(state, self.dtype)}), reply_to=request)


class Stopwatch:
    """Wall and CPU seconds of phases that may lie inside each other; time inside a phase counts for that phase only."""

    def __init__(self) -> None:
        self.seconds: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
        self._inside: list[np.ndarray] = []

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its time counted for ``phase``."""

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            started = _now()
            self._inside.append(np.zeros(2))
            try:
                return function(*args, **kwargs)
            finally:
                whole = _now() - started
                self.seconds[phase] += whole - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole

        return measured

    def rounds(self, owner: Any, name: str) -> list[dict[str, np.ndarray]]:
        """What every later call of ``owner.name`` takes, phase by phase."""
        calls: list[dict[str, np.ndarray]] = []
        function = getattr(owner, name)

        def one(*args: Any) -> None:
            self.seconds.clear()
            function(*args)
            calls.append(dict(self.seconds))

        setattr(owner, name, one)
        return calls

    def watch(self, phase: str, owner: Any, name: str) -> None:
        """Time the attribute ``name`` of an object or class from now on."""
        setattr(owner, name, self.timed(phase, getattr(owner, name)))


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def measure(method: str, clients: int, server_rounds: int) -> list[dict[str, np.ndarray]]:
    """Run ``server_rounds`` rounds of ``clients`` clients; of each ``{phase: [wall, CPU]}`` in ms a client."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        names = [f"client {number:06d}" for number in range(2 * clients)]
        table = {"text": ["a film"] * len(names), "label": ["good", "bad"] * clients, "site": names}
        pd.DataFrame(table).to_csv(path / "rows.csv", index=False)
        config = compose_config(
            [
                f"method={method}", "data=csv", f"data.path={path / 'rows.csv'}", "data.client=site",
                "data.split.unseen_clients=0", "data.split.public_rows=8", f"cohort.size={clients}", "eval.max_rows=1",
                "eval.max_clients=1", f"rounds={server_rounds}", f"eval.every={server_rounds}", "engine=loop",
                f"engine.threads={torch.get_num_threads()}", "partition.min_rows=1",
            ]
        )  # fmt: skip
        worker = worker_for(config.model_dump_json(), folder)
        run_folder = RunFolder(path / "run")
        run_folder.create(config)
        run = FederatedRun(worker, build_strategy(config.strategy, worker.model), run_folder)
        engine = InstantGrid(worker)
        watch = Stopwatch()
        watch.watch("engine", engine, "exchange")
        grid = run.connect(engine)
        layer = grid
        while isinstance(layer, GridLayer):
            watch.watch("meter" if isinstance(layer, MeterGrid) else "codec", layer, "exchange")
            layer = layer.inner
        watch.watch("dispatch", run.strategy, "configure_train")
        watch.watch("aggregate", run.strategy, "aggregate_train")
        watch.watch("error", run, "_expected")
        watch.watch("error", run, "_aggregation_error")
        watch.watch("record", run, "_complete")
        watch.watch("evaluate", run.evaluator, "evaluate")
        watch.watch("other", run, "_round")
        each = watch.rounds(run, "_round")
        select, rounds.cohort = rounds.cohort, watch.timed("select", rounds.cohort)
        run.connect = lambda engine: grid
        try:
            run.run(engine)
        finally:
            rounds.cohort = select
    return [{phase: 1000 * value / clients for phase, value in one.items()} for one in each]


def _total(found: dict[str, np.ndarray]) -> np.ndarray:
    return np.sum([found[phase] for phase in PHASES], axis=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one row a method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000, help="clients a round")
    parser.add_argument("--rounds", type=int, default=5, help="the median one is printed")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("methods", nargs="*", default=METHODS)
    options = parser.parse_args(argv)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    torch.set_num_threads(options.threads)
    print(f"ms a client: wall (CPU), {options.clients} clients a round, median of {options.rounds} rounds")
    for method in options.methods:
        each = sorted(measure(method, options.clients, options.rounds), key=lambda one: _total(one)[0])
        found = each[len(each) // 2]
        wall, cpu = _total(found)
        parts = ", ".join(f"{phase} {found[phase][0]:.3f}" for phase in PHASES)
        print(f"{method:10s} {wall:6.3f} ({cpu:.3f}): {parts}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
