"""Our own variants: real federated rounds (strategy, codec, meter, aggregation error), without evaluation."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.client import Worker
from fedlora.errors import FedloraError
from fedlora.federation import Federation
from simulations.benchmark import processes
from simulations.benchmark.batch_size import fastest
from simulations.benchmark.prepare import settings
from simulations.benchmark.serving import Round, Task
from simulations.callbacks import Callback
from simulations.compose import compose_config
from simulations.engines.build import build_engine
from simulations.engines.choose import settle
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder
from strategies.build import build_strategy


def run(task: Task, serve: Callable[..., None]) -> None:
    """Serve rounds of a :class:`FederatedRun`; ``own_central`` first looks for its best batch size."""
    if task.variant.kind == "federated":
        with _rounds(task, ()) as one_round:
            serve(one_round)
        return
    total = task.prepared.workload.total_rows

    def train(size: int, steps: int) -> None:
        with _rounds(task, _pool(size, steps)) as one_round:
            one_round(1)

    size = fastest(total, train)
    with _rounds(task, _pool(size, total // size)) as one_round:
        serve(one_round, size)


def _pool(size: int, steps: int) -> Sequence[str]:
    return f"client.batch_size={size}", f"client.local_steps={steps}"


@contextmanager
def _rounds(task: Task, more: Sequence[str]) -> Iterator[Round]:
    """A run of ours in a folder of its own, as a function of the round's number."""
    prepared = task.prepared
    base = settings(prepared.workload, prepared.folder, prepared.rounds)
    with tempfile.TemporaryDirectory(dir=prepared.folder) as place:
        folder = RunFolder(Path(place) / "run")
        overrides = [*base, *task.variant.overrides, *more, f"run_dir={folder.path}"]
        worker = Worker(Federation(compose_config(overrides)), folder.store)
        settle(worker)
        config = worker.federation.config
        folder.create(config)
        last = _Last()
        with build_engine(worker) as engine:
            run = FederatedRun(worker, build_strategy(config.strategy, worker.model), folder, [last])
            grid = run.connect(engine)

            def one_round(number: int) -> float:
                run._round(number, grid)
                if len(processes.tree(os.getpid())) <= task.variant.processes and task.variant.processes > 1:
                    raise FedloraError(f"{task.variant.processes} processes should train, and this one is alone")
                if last.record["failures"] or len(last.record["cohort"]) != prepared.workload.clients:
                    raise FedloraError(f"not every client trained: {last.record['failures']}")
                return float(last.record["loss"])

            yield one_round


class _Last(Callback):
    """Remembers what was written down of the last round."""

    def __init__(self) -> None:
        self.record: Mapping[str, Any] = {}

    def on_round_end(self, record: Mapping[str, Any]) -> None:
        self.record = record
