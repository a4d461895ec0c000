"""What every client has released, and whether it may release more.

A release is written down before it is made, in a file of the client's own to which lines are only added: nothing that
happens later, a crash, a round that is repeated, a run that is resumed, takes it back.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from fedlora.config import PrivacyConfig
from fedlora.errors import FedloraError
from fedlora.privacy.accounting import Steps, epsilon_of
from fedlora.privacy.mechanism import Mechanism, delta_for
from fedlora.store import ClientStore, write_atomically

SITS_OUT = "sits out"
"""How the reason starts for which a client without budget does not train."""


class Budget:
    """The budgets of the clients of one store."""

    def __init__(self, store: ClientStore, privacy: PrivacyConfig) -> None:
        self.store, self.privacy = store, privacy

    def admit(self, client: str, records: int, server_round: int, mechanism: Mechanism) -> None:
        """Write down that ``client`` is about to release a round's training.

        A simulated release comes from a seed: when a round is repeated it is the same again and costs nothing more. A
        real one is new each time.

        Raises:
            FedloraError: it would spend more than ``privacy.epsilon``; nothing is written down then.
        """
        seeded = mechanism.seed is not None
        before = self._costs(client, server_round if seeded else None)
        limit, delta = self.privacy.epsilon, delta_for(self.privacy, client, records)
        after = epsilon_of([*before, mechanism.cost], delta, self.privacy.accountant)
        if limit is not None and after > limit:
            spent = epsilon_of(before, delta, self.privacy.accountant)
            raise FedloraError(
                f"{SITS_OUT}: it has spent epsilon {spent:.3f} of {limit:g}, and another round would make {after:.3f}"
            )
        name = "simulated" if seeded else uuid.uuid4().hex
        line = {"round": server_round, "release": name, **asdict(mechanism.cost)}
        lines = self._lines(client)
        if line not in lines:
            path = self.path(client)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(json.dumps(each) + "\n" for each in [*lines, line]))

    def spent(self, client: str, records: int, server_round: int, mechanism: Mechanism) -> float:
        """Epsilon of everything that ``client`` has released up to ``server_round``."""
        costs = self._costs(client, server_round + 1 if mechanism.seed is not None else None)
        return epsilon_of(costs, delta_for(self.privacy, client, records), self.privacy.accountant)

    def path(self, client: str) -> Path:
        """The file of ``client``: one JSON object a release."""
        return self.store.folder_of(client) / "releases.jsonl"

    def _lines(self, client: str) -> list[dict[str, object]]:
        path = self.path(client)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _costs(self, client: str, before_round: int | None) -> list[Steps]:
        """What was released, or what was released before a round of a simulation (each round of it once)."""
        return list(_costs(self._lines(client), before_round))


def _costs(lines: Iterable[dict[str, object]], before_round: int | None) -> Iterable[Steps]:
    simulated: dict[object, Steps] = {}
    for line in lines:
        cost = Steps(*(line[name] for name in ("noise_multiplier", "sample_rate", "count")))  # pyright: ignore
        if line["release"] != "simulated":
            yield cost
        elif before_round is None or line["round"] < before_round:  # pyright: ignore
            simulated[line["round"]] = cost
    yield from simulated.values()
