"""Which clients train in a round. Keyed by (seed, round): no history, so any round can be drawn again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.config import Config
from fedlora.seeding import numpy_rng

NOBODY = ""
"""Stands for an empty cohort, as one drawn client by client can be: strategies prepare a message, and none is sent."""


def cohort(config: Config, clients: Sequence[str], server_round: int) -> tuple[str, ...]:
    """The clients of a round in population order, drawn uniformly without replacement; then its spares as drawn.

    With ``privacy.secret_cohort`` each is drawn for itself, and ``cohort.size`` is the number that is expected: the
    size of a round varies, and may be 0.
    """
    size = config.cohort.size
    if size is None or size >= len(clients):
        return tuple(clients)
    secret = config.privacy.secret
    rng = numpy_rng(config.seed if secret is None else secret, "cohort", server_round)
    if config.privacy.secret_cohort:
        joins = rng.random(len(clients)) < size / len(clients)
        return tuple(client for client, drawn in zip(clients, joins, strict=True) if drawn)
    chosen = np.sort(rng.choice(len(clients), size=size, replace=False))
    asked = [int(i) for i in chosen]
    draws = numpy_rng(config.seed, "spares", server_round)
    wanted = min(size + config.cohort.spares, len(clients))
    while len(asked) < wanted:
        drawn = int(draws.integers(len(clients)))
        if drawn not in asked:
            asked.append(drawn)
    return tuple(clients[i] for i in asked)


def panel(config: Config, clients: Sequence[str]) -> tuple[str, ...]:
    """Clients whose own test rows are evaluated: those that train in some round, at most ``eval.max_clients``.

    Where it is secret who trains, all clients.
    """
    rounds = 0 if config.privacy.secret_cohort else config.rounds
    seen = sorted({client for r in range(1, rounds + 1) for client in cohort(config, clients, r)})
    seen = seen or list(clients)
    limit = config.eval.max_clients
    if limit is None or len(seen) <= limit:
        return tuple(seen)
    chosen = numpy_rng(config.seed, "panel").choice(len(seen), size=limit, replace=False)
    return tuple(seen[int(i)] for i in np.sort(chosen))
