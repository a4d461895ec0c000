"""Random streams keyed by what they are for, so that no result depends on who ran first.

Every draw of a run (cohort, batch order, initial values) comes from ``(seed, *keys)``, for example
``(7, "batches", round, client_id)``: the same whatever the worker, the engine or the order of execution.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

Key = str | int


def derive_seed(seed: int, *keys: Key) -> int:
    """Return a 63-bit seed determined by ``seed`` and ``keys`` (BLAKE2b of their canonical form)."""
    text = "\x1f".join([str(int(seed)), *(f"{type(key).__name__}:{key}" for key in keys)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def numpy_rng(seed: int, *keys: Key) -> np.random.Generator:
    """Return a NumPy generator for the stream ``(seed, *keys)``."""
    return np.random.default_rng(derive_seed(seed, *keys))


def torch_generator(seed: int, *keys: Key) -> torch.Generator:
    """Return a CPU ``torch.Generator`` for the stream ``(seed, *keys)``."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))
