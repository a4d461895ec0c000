"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stack the clients' factors, merge them, start afresh.

The stack of all B_k beside each other and all p_k A_k above each other is the exact mean sum_k p_k s B_k A_k, whatever
the ranks of the clients. It goes into the base, so the next round starts from new factors: A random, B zero. Those come
from the seed and cost no bytes; the stack does, for every client that must bring its base up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fedlora.adapters import State
from fedlora.adapters.lora import Lora
from fedlora.model import AdaptedModel
from strategies.base import Outgoing, Reply, require_lora, weighted_mean
from strategies.corrected import CorrectedStrategy
from strategies.stacking import mean_update


class FLoRA(CorrectedStrategy):
    """Exact for any mixture of ranks with one scale. The head is averaged as usual."""

    client_ranks: ClassVar[bool] = True
    restarts: bool = True

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        super().__init__(weighting)
        self._adapter: Lora | None = None
        self._head: tuple[str, ...] = ()

    def prepare(self, model: AdaptedModel) -> None:
        """Needs both LoRA factors."""
        self._adapter = require_lora(model, "flora", "it stacks pairs of trained factors")
        self._head = tuple(key for key in model.shared if key in model.head)

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """The head, the stacks that the client's base lacks, and the instruction to start from fresh factors."""
        head = {key: state[key] for key in self._head}
        return Outgoing(head, self.update_for(client), {"restart": True})

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """Put the exact mean of the updates into the base. The global factors stay at their start, where dW = 0."""
        assert self._adapter is not None
        states, shares = [reply.state for reply in replies], [reply.weight for reply in replies]
        self.add_residual(mean_update(self._adapter, states, shares), replies)
        return {**state, **weighted_mean(replies, self._head)}
