"""Run one configuration from start (or from its checkpoint) to a finished run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp.strategy import Strategy

from fedlora.client import Worker
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.evaluation import main_value, row_statistics
from fedlora.federation import Federation
from fedlora.grid import ClientGrid
from fedlora.notices import notices
from simulations.callbacks import Callback, ProgressBar
from simulations.client_privacy import client_level
from simulations.engines.build import run_on_engine
from simulations.engines.choose import settle
from simulations.engines.pool import Pools
from simulations.finish import finish, merge_finished
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder
from simulations.tracking import Tracking
from strategies.build import build_strategy

OnEngine = Callable[[Worker, Callable[[ClientGrid], None], Callable[[], None], Callable[..., None], Pools | None], None]
log = logging.getLogger("fedlora")
NOTICES = logging.getLogger("fedlora.notices")


def start(
    config: Config,
    run_dir: Path,
    *,
    merged: bool = False,
    callbacks: Sequence[Callback] = (),
    pools: Pools | None = None,
) -> dict[str, Any]:
    """Run ``config`` in the new folder ``run_dir`` and return its summary.

    Args:
        config: of the run.
        run_dir: its folder, which may not hold a run yet.
        merged: whether the whole model is written, too.
        callbacks: told of every round.
        pools: keeps Ray actors for the next run of this process; the caller closes it.

    Raises:
        InputError: the configuration or the data cannot work, or a run is there already. Nothing is left behind then.
        FedloraError: the run failed.
    """
    folder = RunFolder(run_dir)
    folder.require_new()
    worker = Worker(Federation(config.model_copy(update={"run_dir": str(run_dir)})), folder.store)
    return begin(worker, folder, merged=merged, callbacks=callbacks, pools=pools)


def begin(
    worker: Worker,
    folder: RunFolder,
    *,
    merged: bool = False,
    callbacks: Sequence[Callback] = (),
    pools: Pools | None = None,
    on_engine: OnEngine = run_on_engine,
) -> dict[str, Any]:
    """Run the configuration of ``worker`` in the new ``folder``; see :func:`start`.

    ``on_engine`` calls the rounds of the run with its engine; see :func:`simulations.engines.build.run_on_engine`.
    """
    config = worker.federation.config
    strategy = build_strategy(config.strategy, worker.model)
    _check(worker, strategy)
    client_level(worker.federation, worker.model, strategy)
    callbacks = [*callbacks, *_trackers(config, folder)]
    reasons = settle(worker, getattr(strategy, "trains", True))
    folder.create(worker.federation.config)
    return _run(worker, folder, merged, callbacks, reasons, pools, on_engine)


def _trackers(config: Config, folder: RunFolder) -> list[Callback]:
    return [] if config.tracking.name == "none" else [Tracking(config, folder.path)]


def _check(worker: Worker, strategy: Strategy) -> None:
    """Find what can be wrong before a file is made."""
    federation = worker.federation
    if getattr(strategy, "restarts", False) and federation.config.client.keep_optimizer:
        raise InputError(
            f"client.keep_optimizer=true has no effect with {type(strategy).__name__}, whose clients start from new "
            "factors in every round or every few. Set it to false."
        )
    rows = federation.rows
    if federation.task.config.metric is not None and len(rows):
        first = np.arange(min(len(rows), 1))
        found = row_statistics(worker.model, federation.task, rows, first, 1)
        main_value(federation.task, federation.task.metrics(found))


def resume(
    run_dir: Path, *, merged: bool = False, callbacks: Sequence[Callback] = (), pools: Pools | None = None
) -> dict[str, Any]:
    """Finish the run in ``run_dir`` from its newest checkpoint; a finished run only returns its summary.

    Raises:
        InputError: there is no run, or it was started without checkpoints.
    """
    folder = RunFolder(run_dir)
    config = folder.read_config()
    if config.engine.name == "deploy":
        raise InputError(
            f"{folder.path} is a deployed run: its clients can only be reached by 'fedlora serve --resume'."
        )
    summary = folder.read_summary()
    if summary is None:
        worker = Worker(Federation(config), folder.store)
        return go_on(worker, folder, merged=merged, callbacks=callbacks, pools=pools)
    if merged and not folder.merged.exists():
        merge_finished(config, folder)
    return summary


def go_on(
    worker: Worker,
    folder: RunFolder,
    *,
    merged: bool = False,
    callbacks: Sequence[Callback] = (),
    pools: Pools | None = None,
    on_engine: OnEngine = run_on_engine,
) -> dict[str, Any]:
    """Finish the unfinished run in ``folder``; see :func:`resume` and :func:`begin`."""
    config = worker.federation.config
    if config.checkpoint.every == 0:
        raise InputError(f"{folder.path} was run with checkpoint.every=0, so there is nothing to resume from.")
    callbacks = [*callbacks, *_trackers(config, folder)]
    return _run(worker, folder, merged, callbacks, settle(worker), pools, on_engine)


def _run(
    worker: Worker,
    folder: RunFolder,
    merged: bool,
    callbacks: Sequence[Callback],
    reasons: Sequence[str],
    pools: Pools | None,
    on_engine: OnEngine,
) -> dict[str, Any]:
    started = time.perf_counter()
    handler = logging.FileHandler(folder.log_file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    flower = logging.getLogger("flwr")
    flower_level = flower.level
    flower.setLevel(logging.WARNING)
    callbacks = [*callbacks, ProgressBar(worker.federation.task.main_metric)]
    try:
        _log_start(worker, reasons)
        strategy = build_strategy(worker.federation.config.strategy, worker.model)
        run = FederatedRun(worker, strategy, folder, callbacks)
        if run.client_level is not None:
            log.info("%s", run.client_level.summary()["statement"])
        on_engine(worker, run.run, partial(_each_client, callbacks), run.change_engine, pools)
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


def _log_start(worker: Worker, reasons: Sequence[str]) -> None:
    config, index = worker.federation.config, worker.federation.index
    log.info("method %s, engine %s, seed %d", config.method, config.engine.name, config.seed)
    for reason in reasons:
        log.info("%s", reason)
    log.info("%d training clients, %d unseen, %d public rows", len(index.clients), len(index.unseen), len(index.public))
    affinity = worker.model.affinity
    how = "by its formula" if affinity.error is None else f"measured: {affinity.error:.1e}"
    log.info("adapter %s is %saffine (%s)", worker.federation.adapter.label, "" if affinity.affine else "not ", how)
    for notice in notices(worker.federation):
        NOTICES.warning("%s", notice)


def _each_client(callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        callback.on_client()
