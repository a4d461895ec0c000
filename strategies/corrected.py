"""What strategies share that put a part of the aggregate into the base: who holds which base, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedlora.correction import CorrectionLog, CorrectionUpdate
from fedlora.lowrank import LowRank
from strategies.base import FederatedStrategy, Reply


class CorrectedStrategy(FederatedStrategy):
    """Keeps the sum of all residuals. A client that was away receives those it missed when it returns."""

    exact: ClassVar[bool | None] = True

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        super().__init__(weighting)
        self.log = CorrectionLog()
        self.held: dict[str, int | None] = {}
        self._last: dict[str, LowRank] = {}
        self._addressed: dict[str, int] = {}
        self._updates: dict[int | None, CorrectionUpdate | None] = {}

    def update_for(self, client: str) -> CorrectionUpdate | None:
        """What brings the base of ``client`` up to date; call it in :meth:`send`."""
        self._addressed[client] = self.log.version
        since = self.held.get(client, 0)
        if since not in self._updates:
            self._updates[since] = self.log.update_since(since)
        return self._updates[since]

    def keep_base(self, replies: Sequence[Reply]) -> None:
        """Leave the base as it is; the clients of ``replies`` hold the one they were sent. For :meth:`fold`."""
        for reply in replies:
            self.held[reply.client] = self._addressed[reply.client]
        self._addressed, self._updates, self._last = {}, {}, {}

    def add_residual(self, residual: Mapping[str, LowRank], replies: Sequence[Reply]) -> None:
        """Put ``residual`` into the base; the clients of ``replies`` hold the one they were sent. For :meth:`fold`."""
        self.keep_base(replies)
        self._last = dict(residual)
        self.log.append(residual)

    def failed(self, client: str) -> None:
        """Its base is unknown now: next time it gets the whole sum."""
        self.held[client] = None

    def residual(self) -> dict[str, LowRank]:
        """The last round's residual."""
        return self._last

    def base_correction(self) -> dict[str, Tensor]:
        """The sum of all residuals."""
        return self.log.total

    def state_dict(self) -> dict[str, Any]:
        """The correction log and which base each client holds."""
        return {"log": self.log.state_dict(), "held": dict(self.held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.log.load_state_dict(state["log"])
        self.held = dict(state["held"])
