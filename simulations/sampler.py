"""Which clients train in a round. Keyed by (seed, round): no history, so any round can be drawn again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.config import Config
from fedlora.seeding import numpy_rng


def cohort(config: Config, clients: Sequence[str], server_round: int) -> tuple[str, ...]:
    """The clients of a round, uniformly without replacement, in population order."""
    size = config.cohort.size
    if size is None or size >= len(clients):
        return tuple(clients)
    chosen = numpy_rng(config.seed, "cohort", server_round).choice(len(clients), size=size, replace=False)
    return tuple(clients[int(i)] for i in np.sort(chosen))


def panel(config: Config, clients: Sequence[str]) -> tuple[str, ...]:
    """Clients whose own test rows are evaluated: those that train in some round, at most ``eval.max_clients``."""
    seen = sorted({client for r in range(1, config.rounds + 1) for client in cohort(config, clients, r)})
    seen = seen or list(clients)
    limit = config.eval.max_clients
    if limit is None or len(seen) <= limit:
        return tuple(seen)
    chosen = numpy_rng(config.seed, "panel").choice(len(seen), size=limit, replace=False)
    return tuple(seen[int(i)] for i in np.sort(chosen))
