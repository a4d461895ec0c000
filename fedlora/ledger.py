"""The ledger of communication: one row a message, as it travelled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from fedlora.errors import FedloraError


@dataclass(frozen=True, slots=True)
class Entry:
    """One message.

    Attributes:
        round: server round, from 1.
        client: client id.
        direction: ``down`` (to the client) or ``up``.
        payload: tensor bytes, without setup.
        setup: tensor bytes sent once, such as a basis.
        message: length of the serialised message that carries both.
        transport: bytes on the client's socket in this direction because of the message and its answer.
        status: ``ok`` or why the message was not used.
    """

    round: int
    client: str
    direction: str
    payload: int
    setup: int
    message: int
    transport: int
    status: str = "ok"


BOTH_WAYS = ("payload_up", "payload_down", "message_up", "message_down", "transport_up", "transport_down")
TOTALS = (*BOTH_WAYS, "setup_bytes")
COLUMNS = ("round", "client", "direction", "payload", "setup", "message", "transport", "status")


class Ledger:
    """Entries in the order they were made, with running totals per round."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: list[Entry] = []
        self._rounds: dict[int, dict[str, int]] = {}
        self._newest: tuple[int, dict[tuple[str, str], int]] = (0, {})  # round; direction, client -> place of the last
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Append one message."""
        if entry.round != self._newest[0]:
            self._newest = (entry.round, {})
        self._newest[1][entry.direction, entry.client] = len(self.entries)
        self.entries.append(entry)
        sums = self._rounds.setdefault(entry.round, dict.fromkeys(TOTALS, 0))
        sums[f"payload_{entry.direction}"] += entry.payload
        sums[f"message_{entry.direction}"] += entry.message
        sums[f"transport_{entry.direction}"] += entry.transport
        sums["setup_bytes"] += entry.setup

    def refuse(self, server_round: int, client: str, reason: str) -> None:
        """Note that the reply of ``client`` in the newest round travelled but was not used, and why."""
        newest, places = self._newest
        place = places.get(("up", client))
        if newest == server_round and place is not None:
            self.entries[place] = replace(self.entries[place], status=reason[:200])

    def acknowledge(self, client: str, count: int) -> None:
        """Add what the server says to a reply to the ``transport`` of the message that ``client`` answers."""
        newest, places = self._newest
        place = places["down", client]
        self.entries[place] = replace(self.entries[place], transport=self.entries[place].transport + count)
        self._rounds[newest]["transport_down"] += count

    def since(self, server_round: int) -> Ledger:
        """The entries after ``server_round``; the rounds of a ledger only rise while a run goes on."""
        place = len(self.entries)
        while place and self.entries[place - 1].round > server_round:
            place -= 1
        return Ledger(self.entries[place:])

    def round_totals(self, server_round: int) -> dict[str, int]:
        """Payload, message and transport bytes of one round, up and down, and ``setup_bytes``."""
        return dict(self._rounds.get(server_round, dict.fromkeys(TOTALS, 0)))

    def totals(self) -> dict[str, int]:
        """The same sums over the whole run."""
        return {name: sum(sums[name] for sums in self._rounds.values()) for name in TOTALS}

    def frame(self) -> pd.DataFrame:
        """All entries as a table."""
        return pd.DataFrame({name: [getattr(entry, name) for entry in self.entries] for name in COLUMNS})

    def write(self, path: Path, *, names: bool = True) -> None:
        """Write the table as parquet, atomically; without ``names`` nobody learns from it who took part."""
        temporary = path.with_name(f".{path.name}.tmp")
        types = {name: "str" if name in ("client", "direction", "status") else "int64" for name in COLUMNS}
        frame = self.frame() if names else self.frame().assign(client="?")
        frame.astype(types).to_parquet(temporary, index=False)
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Read a table written by :meth:`write`.

        Raises:
            FedloraError: it was written by a version that did not count the same.
        """
        frame = pd.read_parquet(path)
        if tuple(frame.columns) != COLUMNS:
            raise FedloraError(f"{path} was written by another version of fedlora: start the run again")
        rows = frame.to_dict("records")
        return cls(Entry(**{str(key): value for key, value in row.items()}) for row in rows)
