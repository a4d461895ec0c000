"""What ``privacy=record`` will do to the clients of a run, and what it has cost: for plans and summaries."""

from __future__ import annotations

from typing import Any

from fedlora.federation import Federation
from fedlora.privacy.accounting import epsilon_of, finite
from fedlora.privacy.mechanism import delta_for, mechanism_for
from fedlora.privacy.statement import privacy_summary


def record_privacy(federation: Federation, spent: float | None = None) -> dict[str, Any]:
    """The object ``privacy`` of a plan, or of a summary of a run whose clients have ``spent`` at most so much.

    Beside what :func:`~fedlora.privacy.statement.privacy_summary` has, ``clients`` says of the client with the fewest
    rows and of the one with the most: ``rows``, ``noise_multiplier``, ``sample_rate`` and ``delta``, and the ``steps``
    and ``epsilon`` of a run in which it trains in every round that its budget is for. ``noise_multiplier`` is the
    smallest and ``delta`` the largest of any client, which weigh most. The server of a deployment knows no client's
    rows: there ``clients`` is empty and the others are ``None`` where the configuration leaves them to the clients.

    Raises:
        InputError: no noise keeps the budget.
    """
    config = federation.config
    privacy, rounds = config.privacy, config.privacy.rounds or max(config.rounds, 1)
    sizes = sorted((len(rows), client) for client, rows in federation.index.train.items())
    clients: list[dict[str, Any]] = []
    for rows, client in dict.fromkeys((sizes[0], sizes[-1])) if sizes[-1][0] else ():
        mechanism = mechanism_for(privacy, config.client, config.rounds, client, rows, 0)
        delta = delta_for(privacy, client, rows)
        epsilon = finite(epsilon_of([mechanism.cost] * rounds, delta, privacy.accountant))
        clients.append(
            {
                "rows": rows,
                "noise_multiplier": mechanism.noise_multiplier,
                "sample_rate": mechanism.sample_rate,
                "steps": mechanism.steps * rounds,
                "epsilon": epsilon,
                "delta": delta,
            }
        )
    noise = min((c["noise_multiplier"] for c in clients), default=privacy.noise_multiplier)
    delta = max((c["delta"] for c in clients), default=privacy.delta)
    epsilons = [c["epsilon"] for c in clients]
    bound = finite(spent) if spent is not None else None if None in epsilons else max(epsilons)
    clip = privacy.clip
    assert clip is not None
    summary = privacy_summary("record", bound, delta, noise, clip, privacy.accountant, deployed=federation.deployed)
    return {**summary, "clients": clients}
