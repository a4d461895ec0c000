"""LoRA (Hu et al. 2022): dW = s B A with both factors trained and shared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer

from fedlora.adapters.base import State, register
from fedlora.adapters.factored import LowRankAdapter, factor_weight, seeded_uniform


@register("lora")
class Lora(LowRankAdapter):
    """Both factors are trained, so dW is bilinear in what travels and plain averaging is not exact."""

    affine = False
    trained = ("lora_A", "lora_B")

    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """A is seeded per layer, B is zero: the model starts as the backbone."""
        with torch.no_grad():
            for name, layer in layers.items():
                a = factor_weight(layer, "lora_A")
                a.copy_(seeded_uniform(a.shape[0], a.shape[1], seed, name))
                factor_weight(layer, "lora_B").zero_()
