"""FedIT (Zhang et al. 2023, arXiv 2305.05644): average A and B separately. mean(B) mean(A) is not mean(B A)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from fedlora.adapters import State
from strategies.base import FederatedStrategy, Reply, weighted_mean


class FedIT(FederatedStrategy):
    """The common, approximate rule; the aggregation error of each round says how approximate."""

    exact: ClassVar[bool | None] = False

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The weighted mean of each factor."""
        return weighted_mean(replies)
