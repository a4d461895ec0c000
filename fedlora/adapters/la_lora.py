"""LA-LoRA (Liu et al., ICLR 2026, arXiv 2602.19926): B and A in turn, one a local step.

Where both factors of dW = s B A are trained at once, the noise of differential privacy enters it as a product, too. A
step that trains one of them with the other at rest changes dW by a linear map of its gradient and of its noise.
"""

from __future__ import annotations

from fedlora.adapters.base import register
from fedlora.adapters.factored import LowRankConfig
from fedlora.adapters.lora import Lora

FACTORS = (".lora_B.", ".lora_A.")


@register("la_lora")
class AlternatingLora(Lora):
    """Every round begins with B, which starts at zero. Clients end with factors of their own: plain means are inexact.

    The paper's filter, which smooths noisy gradients along the layer's inputs and outputs, is not there.
    """

    Config = LowRankConfig

    def has_turn(self, key: str, step: int) -> bool:
        """B in steps 0, 2, 4, ..., A in the others."""
        return FACTORS[step % 2] in key
