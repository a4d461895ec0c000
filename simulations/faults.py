"""Clients that drop out, crash or are late, from the seed of a run: a layer between the meter and the engine.

What happens to a client in a round depends on the seed, the round and its id alone, so every method of a seed meets the
same faults, on any engine, and again after a resume. Time is virtual: nothing sleeps, and who would answer after
``cohort.deadline`` does not answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message

from fedlora.config import FaultsConfig
from fedlora.grid import ClientGrid, GridLayer, error_reply
from fedlora.seeding import numpy_rng

DROPPED = "dropped out (simulated)"
CRASHED = "crashed after its work (simulated)"


@dataclass(frozen=True)
class Fate:
    """What happens to a client in a round.

    Attributes:
        dropped: it does no work and releases nothing.
        crashed: it does its work, and keeps what it keeps, but its reply is lost.
        delay: seconds until its reply is there.
    """

    dropped: bool
    crashed: bool
    delay: float


def fate_of(faults: FaultsConfig, seed: int, server_round: int, client: str) -> Fate:
    """The fate of ``client`` in a round: independent coins, and an exponential delay."""
    rng = numpy_rng(seed, "faults", server_round, client)
    dropped, crashed = rng.random() < faults.dropout, rng.random() < faults.crash
    return Fate(bool(dropped), bool(crashed), float(rng.exponential(faults.delay)))


class FaultGrid(GridLayer):
    """Passes on what reaches a client, and returns what comes back of it in time."""

    def __init__(self, inner: ClientGrid, faults: FaultsConfig, seed: int) -> None:
        super().__init__(inner)
        self.faults, self.seed = faults, seed

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Let those work who did not drop out, as long as they need; late replies are left out."""
        fates = [
            fate_of(self.faults, self.seed, self.server_round, self.client_of(request.metadata.dst_node_id))
            for request in requests
        ]
        working = [request for request, fate in zip(requests, fates, strict=True) if not fate.dropped]
        answers = {r.metadata.reply_to_message_id: r for r in self.inner.exchange(working, None)}
        replies = []
        for request, fate in zip(requests, fates, strict=True):
            answer = answers.get(request.metadata.message_id)
            if fate.dropped:
                replies.append(error_reply(request, DROPPED))
            elif answer is None or (timeout is not None and fate.delay > timeout):
                continue
            else:
                replies.append(error_reply(request, CRASHED) if fate.crashed else answer)
        return replies
