"""Full training of the clients' own models with nothing beside them: for the baselines local training and FedAvg.

Where all clients have the same model it travels whole (:class:`~fedlora.personal.model.PersonalModel`); different
models have no tensors in common and can only be trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters.base import Affinity, Place, register
from fedlora.adapters.personal import PersonalAdapter, PersonalConfig, SharedPart
from fedlora.lowrank import LowRank


@register("full")
class Full(PersonalAdapter):
    """The update is the weights themselves: affine, so that a mean is exact."""

    Config = PersonalConfig

    def part(self, width: int, classes: int) -> SharedPart:
        """Nothing."""
        return SharedPart()

    def place(self, key: str, tensor: Tensor) -> Place:
        """The whole model travels."""
        return "shared"

    def affinity(self, layers: Mapping[str, Any]) -> Affinity:
        """Yes."""
        return Affinity(True)

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """Every tensor as a matrix ``[first dimension, the rest]``."""
        return {key: _matrix(value) for key, value in state.items()}


def _matrix(tensor: Tensor) -> LowRank:
    matrix = tensor.reshape(len(tensor), -1)
    m, n = matrix.shape
    if m < n:
        return LowRank(torch.eye(m, dtype=matrix.dtype, device=matrix.device), matrix)
    return LowRank(matrix, torch.eye(n, dtype=matrix.dtype, device=matrix.device))
