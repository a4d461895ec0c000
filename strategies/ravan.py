"""RAVAN (Raje et al. 2025, arXiv 2506.05568): every head is averaged over the clients that trained it.

Clients that are able to train all heads do. A weak client trains some: in a round the heads go round the weak clients
of the cohort, and every round begins with another one, so that all heads are trained equally often and each client
comes to all of them. The heads' parts of dW are orthogonal to each other, and each of them is exactly the mean of the
clients that trained it, with their weights renormalised. That is the sense of *exact* here: it is not the mean of the
clients' whole dW, in which a head would be held back by clients that only hold it as it was sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

from fedlora.adapters import State, ravan
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Outgoing, Reply, Server
from strategies.means import mean_of_trainers


class Ravan(FederatedStrategy):
    """H_i <- sum_k p_k H_k,i / sum_k p_k over the clients that trained head i; the task head over all."""

    exact: ClassVar[bool | None] = True
    client_heads: ClassVar[bool] = True
    over_trainers: ClassVar[bool] = True

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        super().__init__(weighting)
        self._heads = 1
        self._server: Server | None = None
        self._turn = (0, 0)

    def prepare(self, model: AdaptedModel) -> None:
        """Needs heads.

        Raises:
            InputError: the adapter has none.
        """
        if not isinstance(model.adapter, ravan.Ravan):
            raise InputError(
                f"strategy=ravan averages heads, and adapter={model.adapter.label} has none. Use adapter=ravan, or "
                "strategy=average."
            )
        self._heads = cast(ravan.Ravan, model.adapter).heads

    def begin_run(self, server: Server) -> None:
        """Clients say how many heads they can train."""
        self._server = server

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """All heads, and which of them to train where the client cannot train all."""
        assert self._server is not None
        count = self._server.capability(client).heads
        if count is None or count >= self._heads:
            return Outgoing(state)
        current, first = self._turn
        if current != server_round:
            first = server_round - 1
        self._turn = server_round, first + count
        heads = sorted((first + i) % self._heads for i in range(count))
        return Outgoing(state, instructions={"train": list(ravan.head_names(heads))})

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The mean of each head."""
        states, shares = [reply.state for reply in replies], [reply.weight for reply in replies]
        mean = mean_of_trainers(state, states, shares, [reply.trained for reply in replies])
        return {key: value.to(state[key].dtype) for key, value in mean.items()}
