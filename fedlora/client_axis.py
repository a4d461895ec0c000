"""A client axis for the trained layers of a model: one frozen forward pass over the rows of many clients.

The rows of a batch belong to clients, one after the other. Frozen layers do not care; every trained linear layer (the
factors of a low-rank adapter, the task head) multiplies each client's rows with that client's weights, in one grouped
matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.model import AdaptedModel

ALIGNED = 4
"""Inner and outer sizes of a grouped product in fp32 must be multiples of this (16 bytes)."""


class ClientAxis:
    """The trained linear layers of a model and the keys of their weights."""

    def __init__(self, model: AdaptedModel) -> None:
        """Find the layers; :attr:`missing` has the trained keys that are in no plain linear layer."""
        keys = {id(parameter): key for key, parameter in zip(model.trainable, model.parameters(), strict=True)}
        self.layers: dict[nn.Linear, tuple[str | None, str | None]] = {}
        for layer in model.module.modules():
            if type(layer) is not nn.Linear:
                continue
            weight, bias = keys.get(id(layer.weight)), keys.get(id(layer.bias))
            if weight is not None or bias is not None:
                self.layers[layer] = (weight, bias)
        held = {key for pair in self.layers.values() for key in pair}
        self.missing = tuple(key for key in model.trainable if key not in held)

    @contextmanager
    def weights(self, stacked: Mapping[str, Tensor], rows: Tensor) -> Iterator[None]:
        """Use ``stacked`` ``{key: [clients, ...]}`` inside, for batches in which client c has ``rows[c]`` rows."""
        try:
            for layer, (weight, bias) in self.layers.items():
                layer.forward = _grouped(  # type: ignore[method-assign]
                    layer, None if weight is None else stacked[weight], None if bias is None else stacked[bias], rows
                )
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]


def _grouped(layer: nn.Linear, weight: Tensor | None, bias: Tensor | None, rows: Tensor):
    def forward(x: Tensor) -> Tensor:
        y = functional.linear(x, layer.weight) if weight is None else grouped_linear(x, weight, rows)
        if bias is not None:
            each = torch.repeat_interleave(bias, rows, dim=0)
            return y + each.view(len(x), *[1] * (x.ndim - 2), -1)
        return y if layer.bias is None else y + layer.bias

    return forward


def grouped_linear(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Multiply each client's rows with its weights.

    Args:
        x: ``[b, ..., n]``, the rows of client 0 first; b is the sum of ``rows``.
        weight: ``[clients, m, n]``.
        rows: rows of each client ``[clients]``; 0 is allowed.

    Returns:
        ``[b, ..., m]``.
    """
    m, n = weight.shape[1:]
    flat = functional.pad(x.reshape(-1, n), (0, -n % ALIGNED))
    padded = functional.pad(weight, (0, -n % ALIGNED, 0, -m % ALIGNED))
    each = x.shape[1:-1].numel()
    ends = torch.cumsum(rows * each, 0).to(torch.int32)
    y = functional.grouped_mm(flat.contiguous(), padded.transpose(1, 2), offs=ends)
    return y[:, :m].reshape(*x.shape[:-1], m)
