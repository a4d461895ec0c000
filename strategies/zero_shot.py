"""Baseline: no training at all. The majority class for classification, the untouched backbone otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fedlora.adapters import State
from strategies.base import FederatedStrategy, Reply


class ZeroShot(FederatedStrategy):
    """Runs no rounds."""

    exact: ClassVar[bool | None] = None
    communicates: ClassVar[bool] = False
    client_ranks: ClassVar[bool] = True
    client_heads: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    own_subspaces: ClassVar[bool] = True
    evaluation: ClassVar[Literal["global", "personal", "zero_shot"]] = "zero_shot"

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """Never called."""
        return state
