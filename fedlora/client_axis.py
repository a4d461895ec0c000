"""A client axis for the trained layers of a model: one frozen forward pass over the rows of many clients.

The rows of a batch belong to clients, one after the other. Frozen layers do not care; a layer with trained tensors
must use each client's own on that client's rows. There are three ways to do it:

- *grouped*: a linear layer that is trained as a whole (a factor of a low-rank adapter, a head of RAVAN with its scalar,
  the task head) multiplies the rows of all clients with their weights in one grouped (for equal rows: batched) matrix
  product;
- *segment*: any other PEFT layer runs once for each client, on that client's rows with that client's tensors;
- *vmap*: where every client has equally few rows, the same as one vectorised call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from fedlora.adapters import LowRankAdapter
from fedlora.adapters.core import ScaledLinear
from fedlora.model import AdaptedModel

ALIGNED = {torch.float32: 4, torch.bfloat16: 8}
"""Inner and outer sizes of a grouped product must be multiples of this (16 bytes)."""
LINEAR = (nn.Linear, ScaledLinear)
"""The types of layers that are grouped; any other subclass may compute something else."""
VMAP_TOKENS = 64
"""Clients with at most this many tokens each, all equally many, are vectorised instead of run one by one."""


class ClientAxis:
    """The layers of a model that hold trained tensors, and how each of them is run for many clients.

    Attributes:
        grouped: linear layers and the keys of their trained weight, bias and scalar.
        whole: PEFT layers that are run client by client, and the keys of their tensors by local name.
        missing: trained keys that are in no such layer; with one of them there is no client axis.
        vectorise: whether layers of :attr:`whole` may use ``vmap``.
    """

    def __init__(self, model: AdaptedModel) -> None:
        """Find the layers of ``model``."""
        self.model = model
        self.vectorise = False
        differing = model.per_client
        keys = {id(parameter): key for key, parameter in zip(differing, model.parameters(differing), strict=True)}
        self.whole: dict[nn.Module, dict[str, str]] = {}
        for layer in model.layers.values():
            assert isinstance(layer, nn.Module)
            named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
            of_clients = {name: id(tensor) for name, tensor in named if id(tensor) in keys}
            linear = {id(p) for child in layer.modules() if type(child) in LINEAR for p in child.parameters()}
            if not (isinstance(model.adapter, LowRankAdapter) and linear.issuperset(of_clients.values())):
                self.whole[layer] = {name: keys[tensor] for name, tensor in of_clients.items()}
        inside = {id(child) for layer in self.whole for child in layer.modules()}
        self.grouped: dict[nn.Linear, dict[str, str]] = {}
        for layer in model.module.modules():
            if not isinstance(layer, nn.Linear) or type(layer) not in LINEAR or id(layer) in inside:
                continue
            trained = {name: keys[id(p)] for name, p in layer.named_parameters() if id(p) in keys}
            if trained:
                self.grouped[layer] = trained
        held = {key for names in self.grouped.values() for key in names.values()}
        held |= {key for names in self.whole.values() for key in names.values()}
        self.missing = tuple(key for key in model.per_client if key not in held)

    @contextmanager
    def weights(self, stacked: Mapping[str, Tensor], rows: Sequence[int]) -> Iterator[None]:
        """Use ``stacked`` ``{key: [clients, ...]}`` inside, for batches in which client c has ``rows[c]`` rows."""
        shares = _Shares(self.model, rows)
        pieces = {key: stacked[key].unbind(0) for names in self.whole.values() for key in names.values()}
        try:
            for layer, names in self.grouped.items():
                own = {name: stacked[key] for name, key in names.items()}
                layer.forward = _grouped(layer, own, shares)  # type: ignore[method-assign]
            for layer, names in self.whole.items():
                layer.forward = _each(layer, names, stacked, pieces, shares, self.vectorise)  # type: ignore
            yield
        finally:
            for layer in (*self.grouped, *self.whole):
                layer.__dict__.pop("forward", None)


class _Shares:
    """How many leading entries of a layer's input belong to each client."""

    def __init__(self, model: AdaptedModel, rows: Sequence[int]) -> None:
        self.model = model
        self.rows = list(rows)
        self._total = sum(self.rows)
        self._known: dict[tuple[bool, int], list[int]] = {}

    def of(self, layer: nn.Module, x: Tensor) -> tuple[int, list[int]]:
        """The dimension of ``x`` along which clients lie, and the size of each client's part of it."""
        layout = self.model.packer.layout
        if layout is None or not self.model.packer.inside(layer) or x.shape[0] != 1 or x.ndim < 3:
            each = x.shape[0] // self._total  # more than 1 where a model splits its rows, as into windows
            return 0, self.rows if each == 1 else [each * count for count in self.rows]
        packed = x.shape[1] == layout.size
        key = (packed, x.shape[1])
        if key not in self._known:
            lengths = layout.lengths if packed else torch.ones_like(layout.lengths)
            self._known[key] = [int(part.sum()) for part in lengths.split(self.rows)]
            self._known[key][-1] += layout.spare if packed else 0  # nobody reads what becomes of spare rows
        return 1, self._known[key]


def _grouped(layer: nn.Linear, own: Mapping[str, Tensor], shares: _Shares) -> Callable[[Tensor], Tensor]:
    weight, bias = own.get("weight"), own.get("bias")
    if "scale" in own:
        weight = own["weight"] * own["scale"].unsqueeze(-1)

    def forward(x: Tensor) -> Tensor:
        axis, counts = shares.of(layer, x)
        each = x.shape[1 + axis : -1].numel()
        sizes = [count * each for count in counts]
        if weight is None:
            y = functional.linear(x, layer.weight)
        else:
            y = grouped_linear(x.reshape(-1, x.shape[-1]), weight, sizes).view(*x.shape[:-1], -1)
        if bias is not None:
            repeats = torch.tensor(sizes, device=x.device)
            return y + torch.repeat_interleave(bias, repeats, dim=0, output_size=sum(sizes)).view_as(y)
        return y if layer.bias is None else y + layer.bias

    return forward


def grouped_linear(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """Multiply each client's rows with its weights.

    Args:
        x: ``[rows, n]``, those of client 0 first.
        weight: ``[clients, m, n]``.
        sizes: rows of each client; 0 is allowed.

    Returns:
        ``[rows, m]``.
    """
    m, n = weight.shape[1:]
    if min(sizes) == max(sizes):
        return torch.bmm(x.view(len(sizes), sizes[0], n), weight.transpose(1, 2)).view(-1, m)
    aligned = ALIGNED[x.dtype]
    if n % aligned or m % aligned:
        x = functional.pad(x, (0, -n % aligned))
        weight = functional.pad(weight, (0, -n % aligned, 0, -m % aligned))
    ends = torch.tensor(sizes, device=x.device).cumsum(0).to(torch.int32)
    return functional.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)[:, :m]


def _each(
    layer: nn.Module,
    names: Mapping[str, str],
    stacked: Mapping[str, Tensor],
    pieces: Mapping[str, Sequence[Tensor]],
    shares: _Shares,
    vectorise: bool,
) -> Callable[..., Tensor]:
    own = layer.forward
    running = False

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal running
        if running:  # called by functional_call
            return own(x, *args, **kwargs)
        running = True
        try:
            axis, counts = shares.of(layer, x)
            tokens = counts[0] * x.shape[1 + axis : -1].numel()
            if vectorise and len(counts) > 1 and min(counts) == max(counts) and tokens <= VMAP_TOKENS:
                parts = x.unflatten(axis, (len(counts), counts[0])).movedim(axis, 0)
                thetas = {name: stacked[key] for name, key in names.items()}
                found = vmap(lambda theta, part: functional_call(layer, theta, (part, *args), kwargs))(thetas, parts)
                return found.movedim(0, axis).flatten(axis, axis + 1)
            outputs = [
                functional_call(layer, {name: pieces[key][c] for name, key in names.items()}, (part, *args), kwargs)
                for c, part in enumerate(x.split(counts, dim=axis))
            ]
            return torch.cat(outputs, dim=axis)
        finally:
            running = False

    return forward
