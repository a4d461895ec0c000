"""LoRA (Hu et al. 2022): dW = s B A with both factors trained and shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from peft.tuners.lora import LoraLayer
from pydantic import Field

from fedlora.adapters.base import AdapterConfig, Drawn, InTurn, State, register
from fedlora.adapters.factored import LowRankAdapter, LowRankConfig, factor_weight, seeded_uniform
from fedlora.capability import Capability
from fedlora.errors import FedloraError, InputError

Rank = Annotated[int, Field(ge=1)]


class LoraSettings(LowRankConfig):
    """LoRA's settings.

    Attributes:
        client_ranks: ranks of the clients, in the order of their sorted ids and from the start again after the last, or
            drawn with the given shares; ``None``: ``rank`` for all. The scale of all is that of ``rank``. Only some
            strategies can mix ranks.
    """

    client_ranks: InTurn[Rank] | Drawn[Rank] | None


@register("lora")
class Lora(LowRankAdapter):
    """Both factors are trained, so dW is bilinear in what travels and plain averaging is not exact."""

    Config = LoraSettings
    affine = False
    trained = ("lora_A", "lora_B")

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        if self.client_ranks is not None and config.client_modules is not None:
            raise InputError(
                "adapter.client_ranks and adapter.client_modules are both set: let clients differ in one of them, and "
                "set the other to null."
            )
        largest = max(self.client_ranks or (1,))
        if largest > self.sizes.rank:
            raise InputError(
                f"adapter.client_ranks holds {largest}, which is larger than adapter.rank = {self.sizes.rank}. "
                f"A client trains a part of the common factors: use adapter.rank={largest} or smaller ranks."
            )

    @property
    def client_ranks(self) -> list[int] | dict[int, float] | None:
        """``adapter.client_ranks``; ``None`` also where a variant of LoRA has no such setting."""
        return getattr(self.config, "client_ranks", None)

    def require(self, capability: Capability) -> None:
        """A client trains a part of the common factors."""
        rank, largest = capability.rank, self.sizes.rank
        if rank is not None and rank > largest:
            raise FedloraError(f"rank {rank} is above adapter.rank = {largest}: announce at most {largest}")

    @property
    def label(self) -> str:
        """``lora``, or ``lora[r=2..8]`` where clients differ."""
        ranks = self.client_ranks
        return self.config.name if ranks is None else f"{self.config.name}[r={min(ranks)}..{max(ranks)}]"

    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """A is seeded per layer, B is zero: the model starts as the backbone."""
        with torch.no_grad():
            for name, layer in layers.items():
                a = factor_weight(layer, "lora_A")
                a.copy_(seeded_uniform(a.shape[0], a.shape[1], seed, name))
                factor_weight(layer, "lora_B").zero_()
