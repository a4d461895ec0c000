"""The inside of a variant's process: warm up, then one round for every line ``go`` on standard input."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from simulations.benchmark import processes
from simulations.benchmark.prepare import Prepared
from simulations.benchmark.variants import Variant
from simulations.benchmark.workloads import Workload

Round = Callable[[int], float]
"""Trains a round, by its number from 1, and returns its mean loss."""


@dataclass(frozen=True)
class Task:
    """What a variant's process is told when it starts."""

    prepared: Prepared
    variant: Variant

    def to_json(self) -> str:
        """The task as one line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The task that :meth:`to_json` wrote."""
        values = json.loads(text)
        prepared, variant = values["prepared"], values["variant"]
        prepared["workload"] = Workload(**prepared["workload"])
        prepared["folder"] = Path(prepared["folder"])
        variant["overrides"] = tuple(variant["overrides"])
        return cls(Prepared(**prepared), Variant(**variant))


class Server:
    """Answers the driver, one JSON object a line, on what was standard output when the process started."""

    def __init__(self, task: Task, channel: TextIO) -> None:
        self.task = task
        self.channel = channel

    def serve(self, one_round: Round, batch_size: int | None = None) -> None:
        """Train round 1 as a warm-up, then one more round for each ``go`` until the input ends."""
        self._answer(1, one_round, batch_size)
        for number, line in enumerate(sys.stdin, start=2):
            if line.strip() != "go":
                break
            self._answer(number, one_round, batch_size)

    def _answer(self, number: int, one_round: Round, batch_size: int | None) -> None:
        started = time.perf_counter()
        loss = one_round(number)
        seconds = time.perf_counter() - started
        workload = self.task.prepared.workload
        answer: dict[str, Any] = {
            "round": number,
            "seconds": seconds,
            "clients": workload.clients,
            "tokens": self.task.prepared.tokens,
            "rows": workload.total_rows,
            "peak_memory": processes.peak_memory(os.getpid()),
            "loss": loss,
            "batch_size": batch_size,
        }
        if number == 1:
            processes.forget_peak(os.getpid())
        self.channel.write(json.dumps(answer) + "\n")
        self.channel.flush()


def own_channel() -> TextIO:
    """What standard output is now; from here on everything that is printed goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel
