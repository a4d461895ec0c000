"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): both factors are trained, only A travels.

A learns what is common, B stays at its client. There is no one model in the end, and no one dW to aggregate.
"""

from __future__ import annotations

from torch import Tensor

from fedlora.adapters.base import Place, register
from fedlora.adapters.factored import LowRankConfig
from fedlora.adapters.lora import Lora


@register("fedsa")
class SharedALora(Lora):
    """dW_k = s B_k A: A is shared, B_k is the client's own."""

    Config = LowRankConfig

    def place(self, key: str, tensor: Tensor) -> Place:
        """A travels, B does not."""
        return "private" if ".lora_B." in key else "shared"
