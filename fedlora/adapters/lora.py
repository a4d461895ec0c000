"""LoRA (Hu et al. 2022): dW = s B A with both factors trained and shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from peft.tuners.lora import LoraLayer
from pydantic import Field

from fedlora.adapters.base import AdapterConfig, State, register
from fedlora.adapters.factored import LowRankAdapter, LowRankConfig, factor_weight, seeded_uniform
from fedlora.errors import InputError


class LoraSettings(LowRankConfig):
    """LoRA's settings.

    Attributes:
        client_ranks: ranks of the clients in the order of their sorted ids, from the start again after the last;
            ``None``: ``rank`` for all. The scale of all is that of ``rank``. Only some strategies can mix ranks.
    """

    client_ranks: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None


@register("lora")
class Lora(LowRankAdapter):
    """Both factors are trained, so dW is bilinear in what travels and plain averaging is not exact."""

    Config = LoraSettings
    affine = False
    trained = ("lora_A", "lora_B")

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        largest = max(self.client_ranks or (1,))
        if largest > self.sizes.rank:
            raise InputError(
                f"adapter.client_ranks holds {largest}, which is larger than adapter.rank = {self.sizes.rank}. "
                f"A client trains a part of the common factors: use adapter.rank={largest} or smaller ranks."
            )

    @property
    def client_ranks(self) -> tuple[int, ...] | None:
        """``adapter.client_ranks``; ``None`` also where a variant of LoRA has no such setting."""
        ranks = getattr(self.config, "client_ranks", None)
        return None if ranks is None else tuple(ranks)

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
