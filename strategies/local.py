"""Baseline: each client trains alone and keeps its own model. Nothing travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fedlora.adapters import State
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Outgoing, Reply


class Local(FederatedStrategy):
    """A client continues from its own adapter whenever the sampler draws it."""

    exact: ClassVar[bool | None] = None
    communicates: ClassVar[bool] = False
    client_ranks: ClassVar[bool] = True
    client_heads: ClassVar[bool] = True
    own_subspaces: ClassVar[bool] = True
    evaluation: ClassVar[Literal["global", "personal", "zero_shot"]] = "personal"

    def prepare(self, model: AdaptedModel) -> None:
        """Refuse what only a server can start."""
        if model.adapter.needs_public_sample or model.adapter.needs_client_gradients:
            raise InputError(
                "strategy=local: a client alone has no server that could make the start of "
                f"adapter={model.adapter.label}. Use adapter=lora, or adapter=fed_sb with adapter.basis=weight or "
                "adapter.basis=seeded."
            )

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """An instruction to train, and no tensors."""
        return Outgoing({}, instructions={"personal": True})

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """There is no global state to change."""
        return {}
