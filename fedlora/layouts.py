"""What travels to and from clients that differ."""

from __future__ import annotations

from collections.abc import Callable

from fedlora import wire
from fedlora.capability import Capability
from fedlora.model import AdaptedModel


class Layouts:
    """Names and shapes of what travels to and from each client, by its capability; each is made once."""

    def __init__(self, model: AdaptedModel, capability: Callable[[str], Capability]) -> None:
        self.model, self.capability = model, capability
        self._down: dict[int | None, wire.Layout] = {}
        self._up: dict[tuple[Capability, tuple[str, ...]], wire.Layout] = {}

    def down(self, client: str) -> wire.Layout:
        """Names and shapes of what travels to ``client``."""
        rank = self.capability(client).rank
        if rank not in self._down:
            self._down[rank] = self.model.layout(rank)
        return self._down[rank]

    def up(self, client: str, parts: tuple[str, ...] = ()) -> wire.Layout:
        """Names and shapes of what travels from ``client`` when it was asked to train ``parts`` (none: all it can)."""
        key = self.capability(client), parts
        if key not in self._up:
            self._up[key] = self.model.answer_layout(*key)
        return self._up[key]
