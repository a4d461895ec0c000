"""Fed-SB (Singhal et al. 2025, arXiv 2502.15436): average the squares R, and take a new basis every few rounds.

dW = s B R A is linear in R, so the mean of R is exact. A basis that was good at the start may become stale; RAVAN
(Raje et al., NeurIPS 2025, arXiv 2506.05568) names this as a weakness of a gradient basis. With ``refresh: k`` the
update s B R A goes exactly into the base after rounds k, 2k, ..., and R starts again from zero in a new basis: the
model stays the same function. Every client then gets the new basis (setup bytes; a seeded one it draws itself, from
the number of the round) and what its base lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch

from fedlora.adapters import State, fed_sb
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import Outgoing, Reply, Server, weighted_mean
from strategies.corrected import CorrectedStrategy


class FedSB(CorrectedStrategy):
    """Exact in every round. Without ``refresh`` it is the plain average, and the basis of the start stays."""

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples", refresh: int | None = None) -> None:
        """``refresh``: rounds between two new bases; ``None``: never."""
        super().__init__(weighting)
        if refresh is not None and refresh < 1:
            raise InputError(
                f"strategy.refresh = {refresh} is not valid: give the rounds between two new bases, or null for none."
            )
        self.refresh = refresh
        self.restarts = refresh is not None
        self._model: AdaptedModel | None = None
        self._server: Server | None = None
        self._frozen: State = {}
        self._changed = False
        self._drawn_after = 0

    def prepare(self, model: AdaptedModel) -> None:
        """Needs an R to average, and a basis around it that can be made anew."""
        if not isinstance(model.adapter, fed_sb.FedSB):
            raise InputError(
                f"strategy=fed_sb averages the square R between two frozen factors, and "
                f"adapter={model.adapter.label} has none. Use adapter=fed_sb, or strategy=average."
            )
        if self.refresh is not None and model.adapter.needs_client_gradients:
            raise InputError(
                "strategy.refresh makes a new basis on the server, which has no gradients of clients after the start. "
                "Use adapter.basis=gradient, weight or seeded, or strategy.refresh=null."
            )
        self._model = model
        self.frozen_travels = cast(fed_sb.FedSB, model.adapter).settings.basis != "seeded"

    def begin_run(self, server: Server) -> None:
        """The basis of the start, or of the last refresh before a resume."""
        self._server, self._frozen = server, dict(server.frozen)

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """The mean R and the head, what brings the client's base up to date, and which seeded basis it draws."""
        drawn = {"basis": self._drawn_after} if self._drawn_after else {}
        return Outgoing(state, self.update_for(client), drawn)

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The mean of R and of the head; in every ``refresh``-th round the update goes into the base."""
        mean = weighted_mean(replies)
        self._changed = self.refresh is not None and server_round % self.refresh == 0
        if not self._changed:
            self.keep_base(replies)
            return mean
        return self._refreshed(server_round, mean, replies)

    def _refreshed(self, server_round: int, mean: State, replies: Sequence[Reply]) -> State:
        """Put s B R A into the base, make a new basis, and start R from zero."""
        model, server = self._model, self._server
        assert model is not None
        assert server is not None
        adapter = cast(fed_sb.FedSB, model.adapter)
        self.add_residual(adapter.delta({**self._frozen, **mean}), replies)
        start = {key: value if key in model.head else torch.zeros_like(value) for key, value in mean.items()}
        if not self.frozen_travels:
            self._drawn_after = server_round
            self._frozen = adapter.drawn(model.layers, model.seed, server_round)
            return start
        gradients = server.gradients(start) if adapter.needs_public_sample else None
        self._frozen = adapter.refreshed(model.layers, gradients, self.base_correction())
        return start

    def frozen(self) -> State:
        """The new basis, if the last round made one."""
        return dict(self._frozen) if self._changed else {}

    def state_dict(self) -> dict[str, Any]:
        """That of the base, and after which round the seeded basis was drawn."""
        return {**super().state_dict(), "drawn_after": self._drawn_after}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._drawn_after = int(state["drawn_after"])
