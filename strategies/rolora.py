"""RoLoRA (Chen et al. 2024, arXiv 2409.02346): one factor a round, in turn; the other is common and rests.

In a round in which all clients hold the same A and train B, dW = s B A is linear in what travels, and so is it in a
round with B common; a plain mean is exact in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from fedlora.adapters import State
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Outgoing, Reply, require_lora, weighted_mean

FACTORS = ("lora_A", "lora_B")


class RoLoRA(FederatedStrategy):
    """Exact in every round. Odd rounds train B, which starts at zero, even rounds A."""

    exact: ClassVar[bool | None] = True

    def prepare(self, model: AdaptedModel) -> None:
        """Needs both LoRA factors."""
        require_lora(model, "rolora", "it trains two factors in turn")

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """Both factors (a client may have missed the last round), and which of them to train and send back."""
        return Outgoing(state, instructions={"train": [FACTORS[server_round % 2]]})

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The mean of the factor that was trained; the other is the same everywhere."""
        return weighted_mean(replies)
