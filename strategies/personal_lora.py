"""Personal LoRA: the mean of the shared B; every private part stays at its client.

B <- sum_k p_k B_k with one frozen A for all, so the mean of the shared dW is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from fedlora.adapters import State
from fedlora.adapters.personal_lora import PersonalLora as PersonalLoraAdapter
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Reply, weighted_mean


class PersonalLora(FederatedStrategy):
    """Personalised: a client answers with the shared part and its own."""

    exact: ClassVar[bool | None] = True
    own_subspaces: ClassVar[bool] = True
    evaluation: ClassVar[Literal["global", "personal", "zero_shot"]] = "personal"

    def prepare(self, model: AdaptedModel) -> None:
        """Needs the adapter with a private part."""
        if not isinstance(model.adapter, PersonalLoraAdapter):
            raise InputError(
                f"strategy=personal_lora needs adapter=personal_lora, which has a shared and a private part, not "
                f"{model.adapter.label}. method=personal_lora sets both."
            )

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The weighted mean of what travels."""
        return weighted_mean(replies)
