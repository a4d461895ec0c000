"""Owners whose rows are kept apart by a penalty: dW = sum_g s mean(B_k) mean(A_k), approximate.

The strict form of :mod:`strategies.disjoint` with A trained as well (:mod:`fedlora.adapters.o_lora`): a client's model
holds its owner's A and B only. mean(B) mean(A) is not mean(B A), so it is inexact where several clients of a group
reply; the aggregation error of each round says by how much. Blocks overlap as far as the penalty lets them, so the
squared norm of their sum is not the sum of their squared norms.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedlora.adapters import State
from fedlora.adapters.o_lora import OLora as OLoraAdapter
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import Outgoing
from strategies.disjoint import Disjoint


class OLora(Disjoint):
    """The sum over owners of averaged factors. The head is averaged as usual."""

    exact: ClassVar[bool | None] = False

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        """``weighting`` is that of the head and inside a group."""
        super().__init__(weighting, "strict")

    def prepare(self, model: AdaptedModel) -> None:
        """Needs the adapter that has the penalty."""
        if not isinstance(model.adapter, OLoraAdapter):
            raise InputError(
                f"strategy=o_lora aggregates rows that are trained and kept apart by a penalty, and adapter="
                f"{model.adapter.label} has none. Use adapter=o_lora."
            )
        super().prepare(model)

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """The head, and A and B of the client's owner; before it has any, the rows that it starts from."""
        return Outgoing({**state, **self._model.own_of(client), **self.blocks.get(self.owners[client], {})})
