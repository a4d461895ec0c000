"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): average the factors and put what is lost into the base.

The residual sum_k p_k B_k A_k - B A of the averaged factors equals sum_k p_k (B_k - B)(A_k - A), whose rank is at most
(K - 1) r because sum_k p_k (B_k - B) = 0. It is held and sent in that factored form or densely, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedlora.adapters import State
from fedlora.lowrank import LowRank, RunningSum
from fedlora.model import AdaptedModel
from strategies.base import Outgoing, Reply, require_lora, weighted_mean
from strategies.corrected import CorrectedStrategy


class FedEx(CorrectedStrategy):
    """Exact aggregation of LoRA."""

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        super().__init__(weighting)
        self._scale = 1.0
        self._modules: tuple[str, ...] = ()

    def prepare(self, model: AdaptedModel) -> None:
        """Needs both LoRA factors."""
        adapter = require_lora(model, "fedex", "it corrects the product of two averaged factors")
        self._scale, self._modules = adapter.scale, tuple(model.layers)

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """The averaged factors, and what brings the client's base up to date."""
        return Outgoing(state, self.update_for(client))

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """Average the factors; put the residual of the product into the base."""
        mean = weighted_mean(replies)
        self.add_residual({module: self._residual(module, mean, replies) for module in self._modules}, replies)
        return mean

    def _residual(self, module: str, mean: State, replies: Sequence[Reply]) -> LowRank:
        """s sum_{k<K} p_k (B_k - B)(A_k - A_K): the residual with its one dependent term eliminated."""
        key_b, key_a = f"{module}.lora_B.weight", f"{module}.lora_A.weight"
        *others, last = replies
        if not others:
            return LowRank(mean[key_b][:, :0], mean[key_a][:0])
        total = RunningSum(mean[key_b].dtype)
        for reply in others:
            centred = LowRank(reply.state[key_b] - mean[key_b], reply.state[key_a] - last.state[key_a])
            total.add(centred, self._scale * reply.weight)
        return total.value()
