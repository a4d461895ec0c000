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
        affinity = model.affinity
        if affinity.affine:
            return
        measured = "" if affinity.error is None else f" (measured: a mean is off by {affinity.error:.2g} of the update)"
        unknown = "" if affinity.reason is None else f" as far as can be told ({affinity.reason})"
        raise InputError(
            f"strategy=average is exact only for affine adapters, and adapter={model.adapter.label} is not "
            f"one{measured}{unknown}. Use strategy=fedit for the usual inexact average"
            f"{', or strategy=fedex for an exact one' if affinity.error is None and affinity.reason is None else ''}."
        )

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The weighted mean."""
        return weighted_mean(replies)
