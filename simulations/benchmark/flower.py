"""Flower's own simulation: ``run_simulation`` on Ray with FedAvg, two actors of one thread, a SuperNode a client."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import load_file

from fedlora.errors import FedloraError
from simulations.benchmark.flower_client import app
from simulations.benchmark.serving import Task
from simulations.benchmark.variants import THREADS

RAY = {"num_cpus": THREADS, "include_dashboard": False, "log_to_driver": False, "address": "local"}


def run(task: Task, serve: Callable[..., None]) -> None:
    """Serve rounds of ``FedAvg.start`` from inside a ServerApp."""
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    clients, folder = task.prepared.workload.clients, task.prepared.folder
    failures: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            while len(list(grid.get_node_ids())) < clients:
                time.sleep(0.1)
            strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=clients, train_metrics_aggr_fn=mean_loss)
            state = ArrayRecord(load_file(folder / "start.safetensors"))

            def one_round(number: int) -> float:
                nonlocal state
                config = {"folder": str(folder), "number": number, "rebuild": task.variant.rebuild}
                result = strategy.start(grid, state, num_rounds=1, train_config=ConfigRecord(config))
                found = result.train_metrics_clientapp[1]
                if found["rows"] != task.prepared.workload.total_rows:
                    raise FedloraError(f"only {found['rows']} rows were trained")
                state = result.arrays
                return float(cast(float, found["train_loss"]))

            serve(one_round)
        except BaseException as error:
            failures.append(error)

    run_simulation(
        server,
        app,
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": RAY},
    )
    if failures:
        raise failures[0]


def mean_loss(replies: list[RecordDict], weight: str) -> MetricRecord:
    """The mean loss of the replies by rows, and how many rows there were."""
    metrics = [reply.metric_records["metrics"] for reply in replies]
    rows = [int(cast(int, each[weight])) for each in metrics]
    losses = [float(cast(float, each["train_loss"])) * count for each, count in zip(metrics, rows, strict=True)]
    return MetricRecord({"train_loss": sum(losses) / sum(rows), "rows": sum(rows)})
