"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): average the factors and put what is lost into the base.

The residual sum_k p_k B_k A_k - B A of the averaged factors equals sum_k p_k (B_k - B)(A_k - A), whose rank is at most
(K - 1) r because sum_k p_k (B_k - B) = 0. It is held and sent in that factored form or densely, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedlora.adapters import State
from fedlora.adapters.lora import Lora
from fedlora.lowrank import LowRank
from fedlora.model import AdaptedModel
from strategies.base import Outgoing, Reply, require_lora, weighted_mean
from strategies.corrected import CorrectedStrategy
from strategies.stacking import mean_update


class FedEx(CorrectedStrategy):
    """Exact aggregation of LoRA."""

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        super().__init__(weighting)
        self._adapter: Lora | None = None

    def prepare(self, model: AdaptedModel) -> None:
        """Needs both LoRA factors."""
        self._adapter = require_lora(model, "fedex", "it corrects the product of two averaged factors")

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """The averaged factors, and what brings the client's base up to date."""
        return Outgoing(state, self.update_for(client))

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """Average the factors; put the residual of the product into the base."""
        mean = weighted_mean(replies)
        self.add_residual(self._residual(mean, replies), replies)
        return mean

    def _residual(self, mean: State, replies: Sequence[Reply]) -> dict[str, LowRank]:
        """s sum_{k<K} p_k (B_k - B)(A_k - A_K) of every module: the residual with its one dependent term eliminated."""
        assert self._adapter is not None
        *others, last = replies
        if not others:
            return {name: LowRank(d.left[:, :0], d.right[:0]) for name, d in self._adapter.delta(mean).items()}
        around = {key: value if ".lora_B." in key else last.state[key] for key, value in mean.items()}
        states, shares = [reply.state for reply in others], [reply.weight for reply in others]
        return mean_update(self._adapter, states, shares, around=around)
