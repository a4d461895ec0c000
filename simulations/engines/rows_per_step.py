"""How many tokens a common step should have: measured on the machine and the data of the run, in about a second."""

from __future__ import annotations

import time

import numpy as np
import psutil
import torch

from fedlora.cohort import cohort_gradients
from fedlora.trainer import Trainer, is_out_of_memory
from fedlora.training import training_mode

FEWEST, MOST = 1024, 65536
"""Tokens of the smallest and the largest step that is tried."""
WORTH = 1.05
"""A step twice as large must be this much faster a token."""
PATIENCE = 1.0
"""Seconds after which a step is long enough: larger ones gain little where launching is no cost."""
SAFETY = 0.5
"""Share of the free memory that a step may take."""


def measured_tokens(trainer: Trainer, rows: np.ndarray, batch_size: int) -> int:
    """Tokens a step at which a token is fastest, by doubling from :data:`FEWEST` as long as that pays.

    Args:
        trainer: shares the steps of its clients.
        rows: training rows to measure with.
        batch_size: rows of one client in a step.
    """
    lengths = trainer.rows.lengths(rows)
    best, fastest = FEWEST, 0.0
    tokens = FEWEST
    while tokens <= MOST:
        count = max(1, round(tokens / (batch_size * float(lengths.mean()))))
        needed = np.resize(rows, count * batch_size)
        try:
            _step(trainer, needed, count)  # the first one takes its memory
            seconds = _step(trainer, needed, count)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        speed = float(trainer.rows.lengths(needed).sum()) / seconds
        if speed < WORTH * fastest:
            break
        best, fastest = tokens, speed
        if seconds > PATIENCE or not _fits_twice(trainer, count):
            break
        tokens *= 2
    return best


def _step(trainer: Trainer, rows: np.ndarray, clients: int) -> float:
    """Seconds of the forward and backward pass of one common step."""
    assert trainer.axis is not None
    model = trainer.model
    start = model.read(model.trainable)
    leaves = {
        key: value.to(model.device).expand(clients, *value.shape).clone().requires_grad_()
        for key, value in start.items()
    }
    parts = np.split(rows, clients)
    model.own_trainables()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    with training_mode(model.module, 0):
        cohort_gradients(model, trainer.axis, trainer.task, trainer.rows, leaves, parts, len(parts[0]))
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _fits_twice(trainer: Trainer, clients: int) -> bool:
    """Whether a step with twice as many clients fits, judged by what this one took."""
    if trainer.model.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return 2 * torch.cuda.max_memory_allocated() < SAFETY * (free + total) / 2
    taken = psutil.Process().memory_info().rss
    return taken < SAFETY * (psutil.virtual_memory().available + taken)
