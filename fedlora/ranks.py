"""Clients of different LoRA rank on one common pair of factors.

A client of rank r_k trains the leading r_k components: the first columns of B and the first rows of A. The others are
zero in its model; then their gradients are zero too, with any optimiser and weight decay, and they stay zero. So its
model is that of an adapter of rank r_k with the common scale s, and only r_k components travel. The common s is what
stacking clients needs (Wang et al. 2024, arXiv 2409.05976).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def cut_shapes(
    shapes: Shapes, rank: int | None, factors: tuple[str, str] = ("lora_A", "lora_B")
) -> dict[str, tuple[int, ...]]:
    """Shapes of a client of ``rank`` (``None``: the whole): A ``[rank, n]`` and B ``[m, rank]``, the rest as it is.

    ``factors`` are the names of A and B.
    """
    if rank is None:
        return dict(shapes)
    a, b = (f".{factor}.weight" for factor in factors)
    cut = dict(shapes)
    for key, shape in shapes.items():
        if key.endswith(a):
            cut[key] = (rank, shape[1])
        elif key.endswith(b):
            cut[key] = (shape[0], rank)
    return cut


def crop(state: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """The leading part of every tensor whose shape is known; others as they are."""
    return {
        key: value[tuple(slice(0, size) for size in shapes[key])] if len(shapes.get(key, ())) == value.ndim else value
        for key, value in state.items()
    }


def pad(state: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Every tensor as the leading part of one of the full shape, zero elsewhere."""
    padded = {}
    for key, value in state.items():
        full = torch.zeros(shapes[key], dtype=value.dtype, device=value.device)
        full[tuple(slice(0, size) for size in value.shape)] = value
        padded[key] = full
    return padded
