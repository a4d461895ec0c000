"""Weights of layers whatever they are held in."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


def decoded_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as real numbers, as the layer stores it: decoded from 8 or 4 bits (bitsandbytes).

    The layer is not touched, before or after its first forward pass (PEFT's own function moves its parameters about).
    """
    weight = cast(Any, layer.weight)
    kind = type(weight).__name__
    if kind == "Int8Params":
        scale = weight.SCB if getattr(weight, "SCB", None) is not None else cast(Any, layer).state.SCB
        return weight.detach().float() * (scale.view(-1, 1) / 127)
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.detach(), weight.quant_state).detach()
    return weight.detach()
