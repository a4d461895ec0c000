"""The ledger of communication: one row a message, as it travelled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd


@dataclass(frozen=True)
class Entry:
    """One message.

    Attributes:
        round: server round, from 1.
        client: client id.
        direction: ``down`` (to the client) or ``up``.
        payload: tensor bytes, without setup.
        setup: tensor bytes sent once, such as a basis.
        message: length of the serialised message that carries both.
        status: ``ok`` or why the message was not used.
    """

    round: int
    client: str
    direction: str
    payload: int
    setup: int
    message: int
    status: str = "ok"


TOTALS = ("payload_up", "payload_down", "message_up", "message_down", "setup_bytes")
COLUMNS = ("round", "client", "direction", "payload", "setup", "message", "status")


class Ledger:
    """Entries in the order they were made, with running totals per round."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: list[Entry] = []
        self._rounds: dict[int, dict[str, int]] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Append one message."""
        self.entries.append(entry)
        sums = self._rounds.setdefault(entry.round, dict.fromkeys(TOTALS, 0))
        sums[f"payload_{entry.direction}"] += entry.payload
        sums[f"message_{entry.direction}"] += entry.message
        sums["setup_bytes"] += entry.setup

    def refuse(self, server_round: int, client: str, reason: str) -> None:
        """Note that the reply of ``client`` travelled but was not used, and why."""
        for place in range(len(self.entries) - 1, -1, -1):
            entry = self.entries[place]
            if entry.round != server_round:
                return
            if entry.client == client and entry.direction == "up":
                self.entries[place] = replace(entry, status=reason.splitlines()[0][:200])
                return

    def round_totals(self, server_round: int) -> dict[str, int]:
        """``payload_up``, ``payload_down``, ``message_up``, ``message_down`` and ``setup_bytes`` of one round."""
        return dict(self._rounds.get(server_round, dict.fromkeys(TOTALS, 0)))

    def totals(self) -> dict[str, int]:
        """The same sums over the whole run."""
        return {name: sum(sums[name] for sums in self._rounds.values()) for name in TOTALS}

    def frame(self) -> pd.DataFrame:
        """All entries as a table."""
        return pd.DataFrame([asdict(entry) for entry in self.entries], columns=list(COLUMNS))

    def write(self, path: Path) -> None:
        """Write the table as parquet, atomically."""
        temporary = path.with_name(f".{path.name}.tmp")
        self.frame().astype({"client": "str", "direction": "str", "status": "str"}).to_parquet(temporary, index=False)
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Read a table written by :meth:`write`."""
        rows = pd.read_parquet(path).to_dict("records")
        return cls(Entry(**{str(key): value for key, value in row.items()}) for row in rows)
