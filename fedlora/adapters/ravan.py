"""RAVAN (Raje et al. 2025, arXiv 2506.05568): dW = s sum_i s_i B_i H_i A_i, h heads in mutually orthogonal subspaces.

All that is trained are the small squares H_i and the head scalars s_i. A client sends the products s_i H_i and starts
the next round with s_i = 1, so the server's plain average is one of products. dW is linear in them: it is exact. A weak
client trains and sends some of the heads (``client_heads``); all of them are in the model that it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor, nn

from fedlora.adapters import bases
from fedlora.adapters.base import ADAPTER_NAME, AdapterConfig, Drawn, InTurn, Place, State, register
from fedlora.adapters.core import CoreLinear, ScaledLinear
from fedlora.adapters.factored import LowRankAdapter, LowRankConfig, factor_weight, modules_of
from fedlora.capability import Capability
from fedlora.errors import FedloraError, InputError
from fedlora.lowrank import LowRank


@dataclass
class RavanLoraConfig(LoraConfig):
    """PEFT's LoRA of rank h r, and h."""

    heads: int = 1


class Heads(nn.ModuleDict):
    """The core of a layer, block diagonal: the squares H_i ``[r, r]``, each with its scalar s_i."""

    def __init__(self, heads: int, rank: int) -> None:
        super().__init__({name: ScaledLinear(rank) for name in head_names(range(heads))})

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., h r]`` to ``[..., h r]``, each head its own part."""
        parts = x.chunk(len(self), dim=-1)
        return torch.cat([head(part) for head, part in zip(self.values(), parts, strict=True)], dim=-1)


class RavanLinear(CoreLinear):
    """A PEFT LoRA layer with heads between A and B: y = W x + s sum_i s_i B_i H_i A_i x."""

    adapter_layer_names = (*CoreLinear.adapter_layer_names, "lora_H")
    core = "lora_H"

    def new_core(self, r: int, config: LoraConfig) -> nn.Module:
        """Blocks of equal size on the diagonal of ``[r, r]``."""
        heads = cast(RavanLoraConfig, config).heads
        return Heads(heads, r // heads)


def is_scalar(key: str) -> bool:
    """Whether a tensor is a head's scalar."""
    return ".lora_H." in key and key.endswith(".scale")


def head_names(numbers: Iterable[int]) -> tuple[str, ...]:
    """The names under which heads are trained and travel, the factors of a layer."""
    return tuple(f"head{number}" for number in numbers)


Count = Annotated[int, Field(ge=1)]


class RavanConfig(LowRankConfig):
    """RAVAN's settings.

    Attributes:
        heads: how many squares of size ``rank`` a layer has.
        client_heads: how many of them a client trains in a round, in the order of the sorted ids and from the start
            again after the last, or drawn with the given shares; ``None``: all clients train all of them.
    """

    heads: Count
    client_heads: InTurn[Count] | Drawn[Count] | None = None


@register("ravan")
class Ravan(LowRankAdapter):
    """H starts at 0, the head scalars at 1; the basis is orthonormal, seeded for each layer, and costs no bytes."""

    Config = RavanConfig
    affine = True  # in the products, which are what travels

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        most = max(self.client_heads or (1,))
        if most > self.heads:
            raise InputError(
                f"adapter.client_heads holds {most}, and a layer has adapter.heads = {self.heads}. "
                f"Use adapter.heads={most} or smaller numbers."
            )

    @property
    def heads(self) -> int:
        """h."""
        return cast(RavanConfig, self.config).heads

    @property
    def client_heads(self) -> list[int] | dict[int, float] | None:
        """``adapter.client_heads``."""
        return cast(RavanConfig, self.config).client_heads

    def require(self, capability: Capability) -> None:
        """A client trains some of the heads."""
        heads = capability.heads
        if heads is not None and heads > self.heads:
            raise FedloraError(
                f"{heads} heads are more than adapter.heads = {self.heads}: announce at most {self.heads}"
            )

    @property
    def label(self) -> str:
        """``ravan[4x32]``: heads and rank of each; ``ravan[2..4x32]`` where clients train 2 to 4 of them."""
        counts = self.client_heads
        heads = self.heads if counts is None else f"{min(counts)}..{max(counts)}"
        return f"{self.config.name}[{heads}x{self.sizes.rank}]"

    def peft_config(self) -> LoraConfig:
        """PEFT's LoRA of rank h r with our layer in place of its own."""
        return self.lora_config(RavanLoraConfig, RavanLinear, self.heads * self.sizes.rank, heads=self.heads)

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

    def parts(self, capability: Capability) -> tuple[str, ...]:
        """The first heads."""
        return () if capability.heads is None else head_names(range(capability.heads))

    def trains(self, key: str, tensor: Tensor) -> bool:
        """Whether the tensor is of a head."""
        return ".lora_H." in key

    def place(self, key: str, tensor: Tensor) -> Place:
        """The head scalars live for one round."""
        return "round" if is_scalar(key) else super().place(key, tensor)

    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """The model starts as the backbone: H is 0. The heads share out the directions of one orthonormal basis."""
        with torch.no_grad():
            for name, layer in layers.items():
                a, b = factor_weight(layer, "lora_A"), factor_weight(layer, "lora_B")
                for head in cast(Heads, layer.lora_H[ADAPTER_NAME]).values():  # pyright: ignore
                    cast(ScaledLinear, head).weight.zero_()
                    cast(ScaledLinear, head).scale.fill_(1.0)
                if not a.is_meta:
                    basis = bases.seeded_basis(b.shape[0], a.shape[1], a.shape[0], seed, name)
                    b.copy_(basis.left)
                    a.copy_(basis.right)

    def settled(self, state: Mapping[str, Tensor]) -> State:
        """H_i := s_i H_i and s_i := 1: what is averaged are the products."""
        folded = dict(state)
        for key, scale in state.items():
            if is_scalar(key):
                square = f"{key.removesuffix('scale')}weight"
                folded |= {square: state[square] * scale, key: torch.ones_like(scale)}
        return folded

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """dW = s sum_i s_i B_i H_i A_i, as left = s [s_1 B_1 H_1 ... s_h B_h H_h] ``[m, h r]`` and right = A."""
        settled, deltas = self.settled(state), {}
        for module in modules_of(settled):
            b, a = (settled[f"{module}.{factor}.weight"] for factor in self.factors)
            squares = [settled[f"{module}.lora_H.{name}.weight"] for name in head_names(range(self.heads))]
            left = torch.cat([part @ h for part, h in zip(b.chunk(self.heads, dim=1), squares, strict=True)], dim=1)
            deltas[module] = LowRank(left * self.scale, a)
        return deltas
