"""PEFT LoRA layers whose update has more factors than B and A."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional

from fedlora.adapters.factored import factor_weight


class ScaledLinear(nn.Linear):
    """A square linear map ``[r, r]`` times a scalar ``[1]`` of its own: y = s W x."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, rank, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., r]`` to ``[..., r]``."""
        return functional.linear(input, self.weight * self.scale)


class FactorsLinear(Linear):
    """y = W x + s f(x) for a linear f; works for ``nn.Linear`` and for GPT-2's transposed ``Conv1D``."""

    @abstractmethod
    def mapped(self, x: Tensor, adapter: str) -> Tensor:
        """f(x), from ``[..., n]`` to ``[..., m]``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., n]`` to ``[..., m]``."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            dropped = self.lora_dropout[name](self._cast_input_dtype(x, factor_weight(self, "lora_A", name).dtype))
            result = result + (self.mapped(dropped, name) * self.scaling[name]).to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return dW in the orientation of the base weight, for merging."""
        a = factor_weight(self, "lora_A", adapter)
        change = self.mapped(torch.eye(a.shape[1], dtype=a.dtype, device=a.device), adapter) * self.scaling[adapter]
        return change if self.fan_in_fan_out else change.T


class CoreLinear(FactorsLinear):
    """A layer with a small linear map, the core, between its factors: y = W x + s B core(A x).

    Subclasses say what the core is.

    Attributes:
        core: name of the core among the factors, ``lora_...``; to be added to ``adapter_layer_names``.
    """

    core: ClassVar[str]

    @abstractmethod
    def new_core(self, r: int, config: LoraConfig) -> nn.Module:
        """A linear map of ``[..., r]`` to ``[..., r]``."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Create A ``[r, n]``, B ``[m, r]`` as PEFT does, and the core."""
        if not hasattr(self, self.core):
            setattr(self, self.core, nn.ModuleDict())
        getattr(self, self.core)[adapter_name] = self.new_core(r, config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def mapped(self, x: Tensor, adapter: str) -> Tensor:
        """B core(A x)."""
        return self.lora_B[adapter](getattr(self, self.core)[adapter](self.lora_A[adapter](x)))
