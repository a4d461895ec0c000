"""Callbacks on the round loop: what happens around rounds without being part of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Callback:
    """Override what you need; every method does nothing by default. ``record`` is a line of ``rounds.jsonl``."""

    def on_start(self, label: str, rounds: int, completed: int) -> None:
        """The run starts, or goes on after ``completed`` rounds."""

    def on_round_start(self, server_round: int, clients: int) -> None:
        """A round with ``clients`` clients starts."""

    def on_client(self) -> None:
        """A client has answered."""

    def on_round_end(self, record: Mapping[str, Any]) -> None:
        """A round is complete and written down."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run is finished and ``summary.json`` written."""

    def close(self) -> None:
        """The run is over, finished or not."""


class ProgressBar(Callback):
    """Rounds, clients, time left and the main metric. Silent when the output is not a terminal."""

    def __init__(self, main_metric: str) -> None:
        self.main_metric = main_metric
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._rounds: TaskID | None = None
        self._clients: TaskID | None = None

    def on_start(self, label: str, rounds: int, completed: int) -> None:
        """Show the bars on a terminal."""
        if not self.progress.console.is_terminal:
            return
        self.progress.start()
        self._rounds = self.progress.add_task(f"{label} rounds", total=rounds, completed=completed, note="")
        self._clients = self.progress.add_task("clients", total=1, note="")

    def on_round_start(self, server_round: int, clients: int) -> None:
        """Begin the clients' bar again."""
        if self._clients is not None:
            self.progress.reset(self._clients, total=clients)

    def on_client(self) -> None:
        """One client more."""
        if self._clients is not None:
            self.progress.advance(self._clients)

    def on_round_end(self, record: Mapping[str, Any]) -> None:
        """One round more, with the newest value of the main metric."""
        if self._rounds is None:
            return
        value = record["metrics"].get(f"validation_{self.main_metric}")
        self.progress.update(self._rounds, completed=record["round"])
        if value is not None:
            self.progress.update(self._rounds, note=f"{self.main_metric} {value:.3f}")

    def close(self) -> None:
        """Clear the bars."""
        if self._rounds is not None:
            self.progress.stop()
