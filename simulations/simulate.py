"""Run one configuration from start (or from its checkpoint) to a finished run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.client import Worker, client_app, worker_for
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.evaluation import main_value, row_statistics
from fedlora.notices import notices
from simulations.callbacks import Callback, ProgressBar
from simulations.engines.cohort import CohortGrid
from simulations.engines.flower import FlowerGrid, run_on_flower
from simulations.engines.loop import LoopGrid
from simulations.finish import finish, merge_finished
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder
from strategies.build import build_strategy

log = logging.getLogger("fedlora")
NOTICES = logging.getLogger("fedlora.notices")


def resolve(config: Config) -> Config:
    """Fill in what is chosen automatically, so that ``config.yaml`` says what really ran."""
    name = "loop" if config.engine.name == "auto" else config.engine.name
    workers = (config.engine.workers or 2) if name == "flower" else 0
    threads = config.engine.threads or torch.get_num_threads()
    engine = config.engine.model_copy(update={"name": name, "workers": workers, "threads": threads})
    return config.model_copy(update={"engine": engine})


def start(config: Config, run_dir: Path, *, merged: bool = False, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Run ``config`` in the new folder ``run_dir`` and return its summary.

    Raises:
        InputError: the configuration or the data cannot work, or a run is there already. Nothing is left behind then.
        FedloraError: the run failed.
    """
    config = resolve(config).model_copy(update={"run_dir": str(run_dir)})
    folder = RunFolder(run_dir)
    worker_for.cache_clear()  # the model of the run before, in a sweep
    worker = worker_for(config.model_dump_json(), str(folder.path))
    _check(worker, build_strategy(config.strategy, worker.model))
    folder.create(config)
    return _run(config, folder, merged=merged, callbacks=callbacks)


def _check(worker: Worker, strategy: Strategy) -> None:
    """Find what can be wrong before a file is made."""
    federation = worker.federation
    if getattr(strategy, "restarts", False) and federation.config.client.keep_optimizer:
        raise InputError(
            f"client.keep_optimizer=true has no effect with {type(strategy).__name__}, whose clients start from new "
            "factors in every round. Set it to false."
        )
    rows = federation.rows
    if federation.task.config.metric is not None:
        first = next(iter(federation.index.train.values()))[:1]
        found = row_statistics(worker.model, federation.task, rows, first, 1)
        main_value(federation.task, federation.task.metrics(found))


def resume(run_dir: Path, *, merged: bool = False, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Finish the run in ``run_dir`` from its newest checkpoint; a finished run only returns its summary.

    Raises:
        InputError: there is no run, or it was started without checkpoints.
    """
    folder = RunFolder(run_dir)
    config = folder.read_config()
    summary = folder.read_summary()
    if summary is None:
        if config.checkpoint.every == 0:
            raise InputError(f"{folder.path} was run with checkpoint.every=0, so there is nothing to resume from.")
        return _run(config, folder, merged=merged, callbacks=callbacks)
    if merged and not folder.merged.exists():
        merge_finished(config, folder)
    return summary


def _run(config: Config, folder: RunFolder, *, merged: bool, callbacks: Sequence[Callback]) -> dict[str, Any]:
    started = time.perf_counter()
    handler = logging.FileHandler(folder.log_file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    flower = logging.getLogger("flwr")
    flower_level = flower.level
    flower.setLevel(logging.WARNING)
    torch.set_num_threads(config.engine.threads or torch.get_num_threads())
    worker = worker_for(config.model_dump_json(), str(folder.path))
    callbacks = [*callbacks, ProgressBar(worker.federation.task.main_metric)]
    try:
        _log_start(worker)
        run = FederatedRun(worker, build_strategy(config.strategy, worker.model), folder, callbacks)
        on_reply = partial(_each_client, callbacks)
        app = client_app(config.model_dump(), str(folder.path))
        if config.engine.name == "flower":
            workers, threads = config.engine.workers or 2, config.engine.threads or 1

            def server(grid: Grid) -> None:
                run.run(FlowerGrid(grid, workers, on_reply))

            run_on_flower(server, app, workers, threads)
        elif config.engine.name == "cohort":
            run.run(CohortGrid(worker, config.engine.tokens, on_reply))
        else:
            run.run(LoopGrid(app, on_reply))
        summary = finish(run, time.perf_counter() - started, merged)
        for callback in callbacks:
            callback.on_end(summary)
        return summary
    finally:
        for callback in callbacks:
            callback.close()
        flower.setLevel(flower_level)
        log.removeHandler(handler)
        handler.close()


def _log_start(worker: Worker) -> None:
    config, index = worker.federation.config, worker.federation.index
    log.info("method %s, engine %s, seed %d", config.method, config.engine.name, config.seed)
    log.info("%d training clients, %d unseen, %d public rows", len(index.clients), len(index.unseen), len(index.public))
    affinity = worker.model.affinity
    how = "by its formula" if affinity.error is None else f"measured: {affinity.error:.1e}"
    log.info("adapter %s is %saffine (%s)", worker.federation.adapter.label, "" if affinity.affine else "not ", how)
    for notice in notices(worker.federation):
        NOTICES.warning("%s", notice)


def _each_client(callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        callback.on_client()
