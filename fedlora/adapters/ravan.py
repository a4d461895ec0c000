"""RAVAN (Raje et al. 2025, arXiv 2506.05568): dW = s sum_i s_i B_i H_i A_i, h heads in mutually orthogonal subspaces.

All that is trained are the small squares H_i and the head scalars s_i. A client sends the products s_i H_i and starts
the next round with s_i = 1, so the server's plain average is one of products. dW is linear in them: it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import bases
from fedlora.adapters.base import ADAPTER_NAME, Place, State, register
from fedlora.adapters.core import CoreLinear
from fedlora.adapters.factored import LowRankAdapter, LowRankConfig, factor_weight, modules_of
from fedlora.errors import InputError
from fedlora.lowrank import LowRank


@dataclass
class RavanLoraConfig(LoraConfig):
    """PEFT's LoRA of rank h r, and h."""

    heads: int = 1


class Heads(nn.Module):
    """The core of a layer, block diagonal: the blocks H ``[h, r, r]``, each with its scalar s_i ``[h]``."""

    def __init__(self, heads: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, rank, rank))
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., h r]`` to ``[..., h r]``, each head its own part."""
        parts = x.unflatten(-1, self.weight.shape[:2])
        return (torch.einsum("...hj,hij->...hi", parts, self.weight) * self.scale.unsqueeze(-1)).flatten(-2)


class RavanLinear(CoreLinear):
    """A PEFT LoRA layer with heads between A and B: y = W x + s sum_i s_i B_i H_i A_i x."""

    adapter_layer_names = (*CoreLinear.adapter_layer_names, "lora_H")
    core = "lora_H"

    def new_core(self, r: int, config: LoraConfig) -> nn.Module:
        """Blocks of equal size on the diagonal of ``[r, r]``."""
        heads = cast(RavanLoraConfig, config).heads
        return Heads(heads, r // heads)


class RavanConfig(LowRankConfig):
    """RAVAN's settings.

    Attributes:
        heads: how many squares of size ``rank`` a layer has.
    """

    heads: Annotated[int, Field(ge=1)]


@register("ravan")
class Ravan(LowRankAdapter):
    """H starts at 0, the head scalars at 1; the basis is orthonormal, seeded for each layer, and costs no bytes."""

    Config = RavanConfig
    affine = True  # in the products, which are what travels
    factors = ("lora_B", "lora_H", "lora_A")
    trained = ("lora_H",)

    @property
    def heads(self) -> int:
        """h."""
        return cast(RavanConfig, self.config).heads

    @property
    def label(self) -> str:
        """``ravan[4x32]``: heads and rank of each."""
        return f"{self.config.name}[{self.heads}x{self.sizes.rank}]"

    def peft_config(self) -> LoraConfig:
        """PEFT's LoRA of rank h r with our layer in place of its own."""
        rank = self.heads * self.sizes.rank
        config = RavanLoraConfig(
            r=rank,
            lora_alpha=self.alpha_at(rank),  # pyright: ignore[reportArgumentType]
            use_rslora=self.sizes.rslora,
            lora_dropout=self.sizes.dropout,
            init_lora_weights=False,
            heads=self.heads,
        )
        config._register_custom_module({nn.Linear: RavanLinear, Conv1D: RavanLinear})
        return config

    def check(self, layers: Mapping[str, BaseTunerLayer], tensors: Mapping[str, Tensor]) -> None:
        """Refuse also layers that have not enough directions for mutually orthogonal heads."""
        super().check(layers, tensors)
        heads, rank = self.heads, self.sizes.rank
        for name, layer in layers.items():
            n, m = int(layer.in_features), int(layer.out_features)  # pyright: ignore
            if heads * rank > min(m, n):
                raise InputError(
                    f"adapter.heads = {heads} of adapter.rank = {rank} need {heads * rank} orthogonal directions, and "
                    f"layer '{name}' ({m} x {n}) has {min(m, n)}. Use adapter.heads <= {min(m, n) // rank} at this "
                    f"rank{f', or adapter.rank <= {min(m, n) // heads}' if heads <= min(m, n) else ''}."
                )

    def place(self, key: str, tensor: Tensor) -> Place:
        """The head scalars live for one round."""
        return "round" if key.endswith(".lora_H.scale") else super().place(key, tensor)

    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """The model starts as the backbone: H is 0. The heads share out the directions of one orthonormal basis."""
        with torch.no_grad():
            for name, layer in layers.items():
                a, b = factor_weight(layer, "lora_A"), factor_weight(layer, "lora_B")
                core = cast(Heads, layer.lora_H[ADAPTER_NAME])  # pyright: ignore
                core.weight.zero_()
                core.scale.fill_(1.0)
                if not a.is_meta:
                    basis = bases.seeded_basis(b.shape[0], a.shape[1], a.shape[0], seed, name)
                    b.copy_(basis.left)
                    a.copy_(basis.right)

    def settled(self, state: Mapping[str, Tensor]) -> State:
        """H_i := s_i H_i and s_i := 1: what is averaged are the products."""
        folded = dict(state)
        for key, scale in state.items():
            if key.endswith(".lora_H.scale"):
                heads = f"{key.removesuffix('scale')}weight"
                folded |= {heads: state[heads] * scale.view(-1, 1, 1), key: torch.ones_like(scale)}
        return folded

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """dW = s sum_i s_i B_i H_i A_i, as left = s [s_1 B_1 H_1 ... s_h B_h H_h] ``[m, h r]`` and right = A."""
        settled, deltas = self.settled(state), {}
        for module in modules_of(settled):
            b, core, a = (settled[f"{module}.{factor}.weight"] for factor in self.factors)
            left = torch.einsum("mhi,hij->mhj", b.unflatten(1, core.shape[:2]), core).flatten(1)
            deltas[module] = LowRank(left * self.scale, a)
        return deltas
