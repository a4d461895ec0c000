"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): the mean update, cut back to a low rank by an SVD.

The mean sum_k p_k s B_k A_k of clients of any rank has a higher rank than one client. Its best approximation of the
adapter's rank becomes the next pair of factors, strongest component first, and a client of rank r_k gets the leading
r_k components. What the SVD cuts off is lost: the aggregation error says how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from fedlora.adapters import State
from fedlora.adapters.factored import seeded_uniform
from fedlora.adapters.lora import Lora
from fedlora.lowrank import LowRank
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Reply, require_lora, weighted_mean
from strategies.stacking import mean_update

NEGLIGIBLE = 1e-6


class FlexLoRA(FederatedStrategy):
    """Approximate; the best that factors of this rank can do."""

    exact: ClassVar[bool | None] = False
    client_ranks: ClassVar[bool] = True

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        super().__init__(weighting)
        self._adapter: Lora | None = None
        self._head: tuple[str, ...] = ()

    def prepare(self, model: AdaptedModel) -> None:
        """Needs both LoRA factors."""
        self._adapter = require_lora(model, "flexlora", "it refactors the mean of products of two trained factors")
        self._head = tuple(key for key in model.shared if key in model.head)

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The truncated SVD of the mean update, as factors with the scale taken out of B."""
        assert self._adapter is not None
        states, shares = [reply.state for reply in replies], [reply.weight for reply in replies]
        folded: State = {**state, **weighted_mean(replies, self._head)}
        for module, mean in mean_update(self._adapter, states, shares).items():
            rank = self._adapter.sizes.rank
            best = _filled(mean.truncate(rank), rank, server_round, module)
            folded[f"{module}.lora_B.weight"] = best.left / self._adapter.scale
            folded[f"{module}.lora_A.weight"] = best.right
        return folded


def _filled(delta: LowRank, rank: int, server_round: int, module: str) -> LowRank:
    """Exactly ``rank`` components: those without weight get a zero column and a random row, so that they can learn.

    A component whose two factors are zero would have no gradient and stay zero for ever.
    """
    (m, n), used = delta.shape, delta.rank
    if not delta.left.is_meta:
        norms = delta.left.norm(dim=0)
        used = int((norms > NEGLIGIBLE * norms.max()).sum()) if used and norms.max() > 0 else 0
    left, right = torch.zeros(m, rank, device=delta.left.device), delta.right.new_empty(rank, n)
    left[:, :used], right[:used] = delta.left[:, :used], delta.right[:used]
    if not right.is_meta:
        right[used:] = seeded_uniform(rank, n, 0, "flexlora", server_round, module)[used:]
    return LowRank(left, right)
