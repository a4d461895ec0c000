"""Settle what the configuration leaves open about the engine, so that ``config.yaml`` says what really ran."""

from __future__ import annotations

import os

import numpy as np
import torch

from fedlora.client import Worker
from fedlora.config import EngineConfig
from fedlora.errors import InputError
from fedlora.precision import settled_precision
from simulations.engines.cluster import require_cluster
from simulations.engines.rows_per_step import tokens_for
from simulations.memory import TYPICAL_TOKENS

CORES_A_WORKER = 4
"""A process of PyTorch gains little from more; a machine with twice as many cores gets several."""
COHORTS_A_WORKER = 2
"""With fewer cohorts a round than this for each of them, processes would wait for each other."""


def settle(worker: Worker, trains: bool = True) -> list[str]:
    """Choose ``engine.*`` where it is open, measure where that is a matter of speed, and write it into the worker.

    Nothing is measured or chosen again for a configuration that is settled.

    Args:
        worker: of this process.
        trains: whether clients train at all; where none does, the engine does not matter.

    Returns:
        What was chosen and why, in sentences.

    Raises:
        InputError: the settings contradict each other.
    """
    federation = worker.federation
    engine = federation.config.engine
    said: list[str] = []
    workers = _workers(worker, engine)
    threads = engine.threads or (max(1, (os.cpu_count() or 1) // workers) if workers else torch.get_num_threads())
    if workers and engine.address is not None:
        require_cluster(engine.model_copy(update={"threads": threads}))  # before there is a run folder
    torch.set_num_threads(threads)  # also beside workers: what this process computes has the same bits then
    if torch.cuda.is_available():
        worker.model.to("cuda")
    name, tokens = engine.name, engine.tokens
    if reason := worker.pack():
        said.append(f"padding is computed: {reason}")
    if name == "auto" and not trains:
        name = "loop"
    if name in ("auto", "cohort"):
        reason = worker.share_steps()
        if reason:
            said.append(f"clients are trained one after the other: {reason}")
        if name == "auto":
            alone = _clients_a_round(worker) == 1 and worker.budget is None
            name = "loop" if reason or alone else "cohort"
            said.append(f"engine=auto: {name}, {_place(workers)}")
        if name == "cohort" and tokens is None and not reason:
            tokens = _measured(worker)
            said.append(f"a common step has about {tokens} tokens: the fastest of a short measurement")
    if trains and name != "deploy":
        worker.require_privacy()
    settled = engine.model_copy(update={"name": name, "workers": workers, "threads": threads, "tokens": tokens})
    precision = settled_precision(federation.config.precision)
    federation.config = federation.config.model_copy(update={"engine": settled, "precision": precision})
    return said


def _workers(worker: Worker, engine: EngineConfig) -> int:
    if engine.workers is not None:
        if engine.name == "flower" and engine.workers == 0:
            raise InputError("engine=flower runs on Ray actors: set engine.workers to 1 or more.")
        return engine.workers
    if engine.address is not None:
        raise InputError(
            f"engine.address = '{engine.address}' needs engine.workers: how many actors to start on that cluster (one "
            "for each GPU, or for each few cores)."
        )
    if engine.name == "flower":
        return 2
    if engine.name in ("loop", "deploy"):
        return 0
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if gpus:
        return gpus if gpus > 1 else 0
    wanted = min(cores // CORES_A_WORKER, _cohorts_a_round(worker) // COHORTS_A_WORKER)
    return wanted if wanted > 1 else 0


def _cohorts_a_round(worker: Worker) -> int:
    """About how many cohorts a round has."""
    federation = worker.federation
    rows = np.concatenate(list(federation.index.train.values()))
    each = federation.config.client.batch_size * float(federation.rows.lengths(rows).mean())
    return round(_clients_a_round(worker) * each / (federation.config.engine.tokens or TYPICAL_TOKENS))


def _place(workers: int) -> str:
    return f"on {workers} Ray actors" if workers else "in this process (one serves this machine)"


def _measured(worker: Worker) -> int:
    federation = worker.federation
    rows = np.concatenate(list(federation.index.train.values()))
    return tokens_for(worker.trainer, rows, federation.config, _clients_a_round(worker))


def _clients_a_round(worker: Worker) -> int:
    return worker.federation.config.cohort.size or len(worker.federation.clients)
