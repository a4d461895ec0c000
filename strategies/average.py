"""Weighted averaging of the shared tensors (FedAvg, McMahan et al. 2017): exact for every affine adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from fedlora.adapters import State
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Reply, weighted_mean


class Average(FederatedStrategy):
    """theta <- sum_k p_k theta_k. All that FFA-LoRA and Fed-SB need."""

    exact: ClassVar[bool | None] = True

    def prepare(self, model: AdaptedModel) -> None:
        """Refuse adapters whose dW is not affine: the name promises an exact mean."""
        if not model.adapter.affine:
            raise InputError(
                f"strategy=average is exact only for affine adapters, and adapter={model.adapter.label} is not one. "
                "Use strategy=fedit for the usual inexact average, or strategy=fedex for an exact one."
            )

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The weighted mean."""
        return weighted_mean(replies)
