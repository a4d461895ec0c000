"""Baseline: train one model on the pooled rows of the clients that a federated method would have asked.

With ``client.local_epochs`` it sees the same rows as often as the federated methods do, so the gap to them is the price
of federation; with ``client.local_steps`` it takes that many steps on the pool, and needs more of them to do so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedlora.adapters import State
from fedlora.grid import ClientGrid
from strategies.base import FederatedStrategy, Outgoing, Reply

POOL = "central"


class Central(FederatedStrategy):
    """One pseudo-client holds the pooled rows of the round's cohort."""

    exact: ClassVar[bool | None] = None
    communicates: ClassVar[bool] = False
    client_ranks: ClassVar[bool] = True
    client_heads: ClassVar[bool] = True

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message, to the pool."""
        grid = cast(ClientGrid, grid)
        self.begin(arrays)
        self._pool = [grid.client_of(node) for node in grid.get_node_ids()]
        return [self._message(POOL, server_round, arrays, config, grid)]

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """The state and the names of the pooled clients."""
        return Outgoing(state, instructions={"pool": self._pool})

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The one reply is the next state."""
        return replies[0].state
