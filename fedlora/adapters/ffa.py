"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A is frozen and common to all clients, only B is trained."""

from __future__ import annotations

from fedlora.adapters.base import register
from fedlora.adapters.factored import LowRankConfig
from fedlora.adapters.lora import Lora


@register("ffa")
class FrozenALora(Lora):
    """dW = s B A is linear in B, so averaging B is exact. A is seeded per layer and costs no bytes."""

    Config = LowRankConfig
    affine = True
    trained = ("lora_B",)
