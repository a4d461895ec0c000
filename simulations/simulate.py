"""Run one configuration from start (or from its checkpoint) to a finished run folder."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from safetensors.torch import load_file

from fedlora import __version__
from fedlora.adapters import Adapter
from fedlora.client import Worker, client_app, worker_for
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.export import export_adapter, export_merged
from simulations import checkpoint
from simulations.callbacks import Callback, ProgressBar
from simulations.engines.flower import FlowerGrid, run_on_flower
from simulations.engines.loop import LoopGrid
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder, write_atomically
from strategies.build import build_strategy

PACKAGES = ("torch", "transformers", "peft", "flwr", "opacus", "ray", "hydra-core")
log = logging.getLogger("fedlora")


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
    worker = worker_for(config.model_dump_json(), str(folder.path))
    build_strategy(config.strategy, worker.model)  # what can be wrong is found before a file is made
    folder.create(config)
    return _run(config, folder, merged=merged, callbacks=callbacks)


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
        _merge_finished(config, folder)
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
        else:
            run.run(LoopGrid(app, on_reply))
        summary = _finish(run, time.perf_counter() - started, merged)
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
    config, index, rows = worker.federation.config, worker.federation.index, worker.federation.rows
    log.info("method %s, engine %s, seed %d", config.method, config.engine.name, config.seed)
    log.info("%d training clients, %d unseen, %d public rows", len(index.clients), len(index.unseen), len(index.public))
    if index.left_out_clients:
        log.info(
            "left out: %d clients (%d rows) with fewer than partition.min_rows=%d rows",
            index.left_out_clients, index.left_out_rows, config.partition.min_rows,
        )  # fmt: skip
    if rows.truncated:
        log.info("%d of %d rows cut to client.max_length=%d tokens",
                 rows.truncated, len(rows), config.client.max_length)  # fmt: skip


def _each_client(callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        callback.on_client()


def _finish(run: FederatedRun, seconds: float, merged: bool) -> dict[str, Any]:
    """Write what a finished run leaves: adapter, ledger, and the summary last."""
    folder, config = run.folder, run.config
    head = run.worker.model.head
    rounds = folder.read_rounds()
    last = rounds[-1]
    if run.ours is None or run.ours.evaluation == "global":
        correction = run.ours.base_correction() if run.ours is not None else {}
        run.evaluator.load(run.state, run.ours)
        head_state = run.worker.model.read(head)
        adapter_state = {key: value for key, value in run.state.items() if key not in head}
        export_adapter(run.federation, folder.adapter, adapter_state, run.frozen, correction, head_state)
        if merged:
            export_merged(run.federation, folder.merged, adapter_state, run.frozen, correction, head_state)
    run.ledger.write(folder.ledger_file)
    errors = [r["aggregation_error"] for r in rounds if r["aggregation_error"] is not None]
    trained = max(run.rounds, 1)
    totals = run.ledger.totals()
    summary: dict[str, Any] = {
        "method": config.method,
        "label": label(config, run.federation.adapter, run.ours is None or run.ours.trains),
        "seed": config.seed,
        "rounds": run.rounds,
        "main_metric": run.federation.task.main_metric,
        "final": {"round": last["round"], "metrics": last["metrics"], "clients": last["clients"]},
        "best": run.best,
        "totals": totals,
        "per_round": {
            key: totals[key] / trained for key in ("payload_up", "payload_down", "message_up", "message_down")
        },
        "communicates": run.ours is None or run.ours.communicates,
        "aggregation_error": {"max": max(errors), "last": errors[-1]} if errors else None,
        "failures": sum(len(record["failures"]) for record in rounds),
        "seconds": {**_phases(rounds), "total": round(seconds, 3)},
        "clients": {
            "population": len(run.federation.clients),
            "unseen": len(run.federation.index.unseen),
            "evaluated": len(run.evaluator.panel),
            "left_out": run.federation.index.left_out_clients,
        },
        "versions": {"fedlora": __version__, **{name: version(name) for name in PACKAGES}},
    }
    run.folder.store.collect()
    write_atomically(folder.summary_file, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    checkpoint.remove(folder.checkpoint)
    return summary


def label(config: Config, adapter: Adapter, trains: bool) -> str:
    """The method with every choice that changes its numbers, as tables print it: ``fed_sb[gradient]``.

    A strategy that is not ours names itself: ``FedMedian(lora)``.
    """
    target = str(config.strategy["_target_"])
    if not target.startswith("strategies."):
        return f"{target.replace(':', '.').rpartition('.')[2]}({adapter.label})"
    return config.method + (adapter.label.removeprefix(adapter.config.name) if trains else "")


def _phases(rounds: list[dict[str, Any]]) -> dict[str, float]:
    phases = rounds[0]["seconds"]
    return {phase: round(math.fsum(record["seconds"][phase] for record in rounds), 3) for phase in phases}


def _merge_finished(config: Config, folder: RunFolder) -> None:
    worker = worker_for(config.model_dump_json(), str(folder.path))
    native = folder.adapter / "fedlora_state.safetensors"
    if not native.exists():
        raise InputError(f"{folder.path}: method {config.method} leaves no single model that could be merged.")
    tensors = load_file(native)
    prefix = "base_model.model."
    saved = load_file(folder.adapter / "adapter_model.safetensors")
    head = {
        key.removeprefix(prefix): value for key, value in saved.items() if key.removeprefix(prefix) in worker.model.head
    }
    path = folder.adapter / "base_correction.safetensors"
    correction = load_file(path) if path.exists() else {}
    export_merged(worker.federation, folder.merged, tensors, {}, correction, head)
