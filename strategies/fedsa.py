"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): the mean of A; every B stays at its client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fedlora.adapters import State
from fedlora.adapters.fedsa import SharedALora
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Reply, weighted_mean


class FedSA(FederatedStrategy):
    """Personalised: every client has its own B, so there is no one dW that an aggregate could be exact about."""

    exact: ClassVar[bool | None] = None
    evaluation: ClassVar[Literal["global", "personal", "zero_shot"]] = "personal"

    def prepare(self, model: AdaptedModel) -> None:
        """Needs the adapter that keeps B at home."""
        if not isinstance(model.adapter, SharedALora):
            raise InputError(
                f"strategy=fedsa needs adapter=fedsa, which keeps B at the client, not {model.adapter.label}. "
                "method=fedsa sets both."
            )

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The weighted mean of what travels."""
        return weighted_mean(replies)
