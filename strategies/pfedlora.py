"""pFedLoRA (Yi et al. 2023, arXiv 2310.13283): the mean of one small adapter; every private model stays at its client.

theta <- sum_k (n_k / n) theta_k. The adapter is a product of two trained layers and each is averaged for itself, so the
mean map is not the mean of the clients' maps: the aggregation error says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fedlora.adapters import State
from fedlora.adapters.pfedlora import PFedLoRA as PFedLoRAAdapter
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Reply, weighted_mean


class PFedLoRA(FederatedStrategy):
    """Personalised: a client answers with its own model and the shared adapter."""

    exact: ClassVar[bool | None] = False
    evaluation: ClassVar[Literal["global", "personal", "zero_shot"]] = "personal"

    def prepare(self, model: AdaptedModel) -> None:
        """Needs the adapter that stands beside private models."""
        if not isinstance(model.adapter, PFedLoRAAdapter):
            raise InputError(
                f"strategy=pfedlora needs adapter=pfedlora beside private models, not {model.adapter.label}. "
                "method=pfedlora sets both, and backbone=heterogeneous."
            )

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The weighted mean of the adapters."""
        return weighted_mean(replies)
