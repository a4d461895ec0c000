"""How many tokens a common step should have: measured on the machine and the data of the run, in about a second.

The answer is kept in the cache folder, so that the same run on the same machine has the same cohorts again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from fedlora.cohort_gradients import cohort_gradients
from fedlora.config import Config
from fedlora.encoded import cache_folder
from fedlora.trainer import Trainer, is_out_of_memory
from fedlora.training import training_mode

ON_CPU = (1024, 2048)
"""Tokens of a step that are tried on a CPU: more takes memory and gains a few per cent."""
ON_GPU = (2048, 4096, 8192, 16384, 32768, 65536)
WORTH = 1.03
"""A larger step must be this much faster a token."""
SHARE = 0.4
"""Share of the GPU's free memory that a step may take to be doubled."""


def tokens_for(trainer: Trainer, rows: np.ndarray, config: Config, clients: int) -> int:
    """Tokens of a common step for this run on this machine, measured or remembered.

    Args:
        trainer: shares the steps of its clients.
        rows: training rows to measure with.
        config: of the run.
        clients: clients of a round; a step never has more.
    """
    parts = (
        platform.node(),
        platform.processor(),
        os.cpu_count(),
        torch.get_num_threads(),
        torch.__version__,
        torch.cuda.get_device_name() if trainer.model.device.type == "cuda" else "cpu",
        config.backbone,
        sorted(config.adapter.items(), key=str),
        config.client,
        config.precision,
        config.engine.packing,
        clients,
        len(rows),
        int(trainer.rows.lengths(rows).sum()),
    )
    path = cache_folder() / "tokens" / hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    if path.exists():
        return int(path.read_text())
    tokens = measured_tokens(trainer, rows, config.client.batch_size, clients)
    _remember(path, tokens)
    return tokens


def measured_tokens(trainer: Trainer, rows: np.ndarray, batch_size: int, clients: int) -> int:
    """Tokens a step at which a token is fastest, from the smallest on as long as more pays and fits the memory."""
    lengths = trainer.rows.lengths(rows)
    on_gpu = trainer.model.device.type == "cuda"
    tried = ON_GPU if on_gpu else ON_CPU
    best, fastest = tried[0], 0.0
    for tokens in tried:
        count = min(clients, max(1, round(tokens / (batch_size * float(lengths.mean())))))
        needed = np.resize(rows, count * batch_size)
        free = torch.cuda.mem_get_info()[0] if on_gpu else 0
        try:
            _step(trainer, needed, count)  # the first one takes its memory
            seconds = _step(trainer, needed, count)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        speed = float(trainer.rows.lengths(needed).sum()) / seconds
        if speed > WORTH * fastest:
            best, fastest = tokens, speed
        if count == clients or (on_gpu and free - torch.cuda.mem_get_info()[0] > SHARE * free):
            break
    return best


def _step(trainer: Trainer, rows: np.ndarray, clients: int) -> float:
    """Seconds of the forward and backward pass of one common step."""
    assert trainer.axis is not None
    model = trainer.model
    start = model.read(model.per_client)
    leaves = {
        key: value.to(model.device).expand(clients, *value.shape).clone().requires_grad_(key in model.trainable)
        for key, value in start.items()
    }
    parts = np.split(rows, clients)
    model.own_trainables()
    _wait(model.device)
    began = time.perf_counter()
    with training_mode(model.module, 0):
        cohort_gradients(model, trainer.axis, trainer.task, trainer.rows, leaves, parts, len(parts[0]))
    _wait(model.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _remember(path: Path, tokens: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(str(tokens))
    temporary.replace(path)
