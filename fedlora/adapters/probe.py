"""dW of any PEFT layer, measured: what the layer adds to its base layer on seeded random inputs.

Few PEFT methods give dW in factored form, and some do not give it at all. What every layer has is a forward pass, so
dW is known by what it does to 128 Gaussian inputs: enough for norms and distances, and so for the aggregation error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.quantised import decoded_weight
from fedlora.lowrank import LowRank
from fedlora.seeding import torch_generator

DIRECTIONS = 128


def measured_delta(layers: Mapping[str, BaseTunerLayer]) -> dict[str, LowRank]:
    """What each layer adds to its base layer on ``q = min(n, 128)`` Gaussian inputs, the same at every call.

    Layers are copied and evaluated in fp64 without dropout, because dW is small beside the weight that it changes. A
    layer that is not linear in its input is compared on these inputs.

    Returns:
        ``{module: LowRank}`` in probe coordinates: left ``[m, q]`` the outputs, right the identity ``[q, q]``.
    """
    deltas = {}
    for name, layer in layers.items():
        rows = directions(name, features(layer.get_base_layer())[1])
        outputs = _difference(cast(nn.Module, layer), rows)
        deltas[name] = LowRank(outputs.T.contiguous(), torch.eye(len(rows), dtype=outputs.dtype))
    return deltas


def directions(module: str, n: int) -> Tensor:
    """The inputs ``[q, n]`` on which a module is measured."""
    return torch.randn(min(n, DIRECTIONS), n, generator=torch_generator(0, "probe", module), dtype=torch.float64)


def features(base: nn.Module) -> tuple[int, int]:
    """Output and input features ``(m, n)`` of a linear or normalisation layer."""
    if isinstance(base, Conv1D):
        return int(base.nf), int(base.weight.shape[0])
    if isinstance(base, nn.LayerNorm):
        return int(base.normalized_shape[-1]), int(base.normalized_shape[-1])
    linear = cast(nn.Linear, base)
    return int(linear.out_features), int(linear.in_features)


def _difference(layer: nn.Module, rows: Tensor) -> Tensor:
    """layer(rows) - base(rows) ``[q, m]``."""
    try:
        return _forward(_copied(layer).double(), rows)
    except RuntimeError:  # a few layers hold fp32 tensors that they do not register
        return _forward(_copied(layer), rows.float())


def _copied(layer: nn.Module) -> nn.Module:
    """A copy for evaluation; a quantised base layer is decoded, whose own arithmetic is coarser than dW."""
    base: Any = cast(BaseTunerLayer, layer).get_base_layer()
    if all(parameter.is_floating_point() for parameter in base.parameters()):
        return copy.deepcopy(layer).eval()
    m, n = features(base)
    plain = nn.Linear(n, m, bias=base.bias is not None, device="meta").to_empty(device=base.weight.device)
    with torch.no_grad():
        plain.weight.copy_(decoded_weight(base))
        if base.bias is not None:
            plain.bias.copy_(base.bias)
    return copy.deepcopy(layer, {id(base): plain}).eval()


def _forward(layer: nn.Module, rows: Tensor) -> Tensor:
    rows = rows.to(next(layer.parameters()).device)
    with torch.no_grad():
        base: nn.Module = cast(BaseTunerLayer, layer).get_base_layer()
        return (layer(rows) - base(rows)).cpu()
