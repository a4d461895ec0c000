"""LoRA-GA (Wang et al., NeurIPS 2024, arXiv 2407.05000): LoRA whose factors start along the gradient of the backbone.

With the gradient's singular vectors U, V of the public sample, A starts as the leading r rows of V^T and B as the next
r columns of U, so that the first step of B A is the best one of its rank (Theorem 3.1). The model must start as the
backbone all the same: dW = s (B A - B0 A0), where the frozen B0, A0 are the start. The paper subtracts s B0 A0 from the
weight; here it stays beside it. The start cannot be derived from the seed, so every client receives it once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor, nn

from fedlora.adapters import bases
from fedlora.adapters.base import State, register
from fedlora.adapters.factored import LowRankAdapter, LowRankConfig, factor_weight, modules_of, seeded_uniform
from fedlora.errors import InputError
from fedlora.lowrank import LowRank


class LoraGALinear(Linear):
    """A PEFT LoRA layer beside which its own start is taken away: y = W x + s (B A x - B0 A0 x).

    Works for ``nn.Linear`` and for GPT-2's transposed ``Conv1D``.
    """

    adapter_layer_names = (*Linear.adapter_layer_names, "lora_B0", "lora_A0")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Create A ``[r, n]`` and B ``[m, r]`` as PEFT does, and A0 and B0 of the same sizes."""
        if not hasattr(self, "lora_B0"):
            self.lora_B0, self.lora_A0 = nn.ModuleDict(), nn.ModuleDict()
        n, m = int(self.in_features), int(self.out_features)  # pyright: ignore
        self.lora_B0[adapter_name], self.lora_A0[adapter_name] = nn.Linear(r, m, False), nn.Linear(n, r, False)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., n]`` to ``[..., m]``; what is taken away belongs to the backbone, so no dropout is on its way."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            inputs = self._cast_input_dtype(x, factor_weight(self, "lora_A", name).dtype)
            moved = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](inputs)))
            start = self.lora_B0[name](self.lora_A0[name](inputs))
            result = result + ((moved - start) * self.scaling[name]).to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s (B A - B0 A0) in the orientation of the base weight, for merging."""
        b, a, b0, a0 = (factor_weight(self, factor, adapter) for factor in ("lora_B", "lora_A", "lora_B0", "lora_A0"))
        moved = b @ a - b0 @ a0
        return (moved.T if self.fan_in_fan_out else moved) * self.scaling[adapter]


class LoraGAConfig(LowRankConfig):
    """LoRA-GA's settings.

    Attributes:
        gamma: A and B start with singular values ``m^(1/4) / sqrt(gamma)``, m being the outputs of a layer; the larger,
            the smaller they are.
    """

    gamma: Annotated[float, Field(gt=0)]


@register("lora_ga")
class LoraGA(LowRankAdapter):
    """Both factors are trained, so dW is bilinear in what travels and plain averaging is not exact."""

    Config = LoraGAConfig
    affine = False
    factors = ("lora_B", "lora_A", "lora_B0", "lora_A0")
    trained = ("lora_A", "lora_B")

    @property
    def broadcast_frozen(self) -> bool:
        """The start comes from gradients that only the server has."""
        return True

    @property
    def needs_public_sample(self) -> bool:
        """For the gradients."""
        return True

    def peft_config(self) -> LoraConfig:
        """PEFT's LoRA with our layer in place of its own."""
        return self.lora_config(LoraConfig, LoraGALinear)

    def check(self, layers: Mapping[str, BaseTunerLayer], tensors: Mapping[str, Tensor]) -> None:
        """Refuse also layers with fewer than 2 r singular vectors."""
        super().check(layers, tensors)
        for name, layer in layers.items():
            most = min(int(layer.in_features), int(layer.out_features)) // 2  # pyright: ignore
            if self.sizes.rank > most:
                raise InputError(
                    f"adapter.rank = {self.sizes.rank} needs {2 * self.sizes.rank} singular vectors, more than layer "
                    f"'{name}' has. Use adapter.rank <= {most} with adapter=lora_ga."
                )

    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """A, A0, B and B0 along the gradients; without them a client waits for the server's, and is plain LoRA."""
        gamma = cast(LoraGAConfig, self.config).gamma
        with torch.no_grad():
            for name, layer in layers.items():
                b, a, b0, a0 = (factor_weight(layer, factor) for factor in self.factors)
                if gradients is None:
                    a.copy_(seeded_uniform(a.shape[0], a.shape[1], seed, name))
                    for factor in (b, b0, a0):
                        factor.zero_()
                else:
                    left, right = bases.gradient_factors(gradients[name], self.sizes.rank, gamma)
                    for factor, start in ((b, left), (a, right), (b0, left), (a0, right)):
                        factor.copy_(start)

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """dW = s (B A - B0 A0), as left = s [B, -B0] ``[m, 2 r]`` and right = [A; A0] ``[2 r, n]``."""
        deltas = {}
        for module in modules_of(state):
            b, a, b0, a0 = (state[f"{module}.{factor}.weight"] for factor in self.factors)
            deltas[module] = LowRank(b * self.scale, a) - LowRank(b0 * self.scale, a0)
        return deltas
