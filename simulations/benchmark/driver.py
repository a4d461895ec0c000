"""The driver: one process a variant, one round each in turn, all others stopped meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simulations.benchmark import processes
from simulations.benchmark.machine import Peaks, measured_peaks
from simulations.benchmark.prepare import Prepared, prepare
from simulations.benchmark.serving import Task
from simulations.benchmark.variants import THREADS, Variant
from simulations.benchmark.workloads import Workload

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": str(THREADS),
}
Tell = Callable[[str], None]


def measure(workload: Workload, variants: Sequence[Variant], repeats: int, tell: Tell) -> dict[str, Any]:
    """Measure ``repeats`` rounds of every variant.

    Args:
        workload: what is trained in a round.
        variants: who trains it.
        repeats: rounds of each variant after its warm-up. In every repeat each variant runs one round, and the first
            to run is another one each time.
        tell: shows a line of progress.

    Returns:
        ``workload``, ``tokens`` and ``flops`` of a round, ``peaks`` (FLOP/s before and after) and ``variants``: for
        each name ``answers`` of all rounds, the warm-up first, or the ``error`` for which it was not measured.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as place:
        folder = Path(place)
        tell(f"{workload.name}: {workload.described}")
        prepared = prepare(workload, folder / "workload", repeats + 1)
        before = measured_peaks(THREADS)
        contestants = [_Contestant(Task(prepared, variant), folder / f"{variant.name}.log") for variant in variants]
        try:
            for each in contestants:
                each.warm_up()
                tell(f"  {each.name}: {each.last}")
            for repeat in range(repeats):
                start = repeat % len(contestants)
                for each in contestants[start:] + contestants[:start]:
                    if each.error is not None:
                        continue
                    each.go()
                    tell(f"  {repeat + 1}/{repeats} {each.name}: {each.last}")
        finally:
            for each in contestants:
                each.close()
        return _document(prepared, before, measured_peaks(THREADS), contestants)


def _document(prepared: Prepared, before: Peaks, after: Peaks, contestants: Sequence[_Contestant]) -> dict[str, Any]:
    workload = prepared.workload
    return {
        "workload": workload.name,
        "described": workload.described,
        "clients": workload.clients,
        "rows": workload.total_rows,
        "tokens": prepared.tokens,
        "flops": prepared.flops,
        "peaks": {"before": before, "after": after},
        "variants": {
            each.name: {"answers": each.answers} if each.error is None else {"error": each.error}
            for each in contestants
        },
    }


class _Contestant:
    """The process of a variant, stopped unless it is its turn."""

    def __init__(self, task: Task, log: Path) -> None:
        self.task, self.log = task, log
        self.name = task.variant.name
        self.answers: list[dict[str, Any]] = []
        self.error: str | None = None
        self._process: subprocess.Popen[str] | None = None

    @property
    def last(self) -> str:
        """The last answer in words."""
        if self.error is not None:
            return f"failed: {self.error}"
        answer = self.answers[-1]
        others = answer["other_load"]
        told = f"{answer['seconds']:.2f} s, loss {answer['loss']:.4f}"
        return told if others <= 0.05 else f"{told}, everything else {others:.0%} of the cores"

    def warm_up(self) -> None:
        """Start the process and wait for its warm-up."""
        command = [sys.executable, "-m", "simulations.benchmark.variant_process", self.task.to_json()]
        surroundings = {**os.environ, **QUIET, "FLWR_HOME": str(self.task.prepared.folder / "flwr")}
        pipe = subprocess.PIPE
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, text=True, bufsize=1, env=surroundings
            )
        self._read(self._process)

    def go(self) -> None:
        """Run one round."""
        process = self._process
        if self.error is not None or process is None or process.stdin is None:
            return
        processes.resume(process.pid)
        with contextlib.suppress(BrokenPipeError):  # it died: reading tells why
            process.stdin.write("go\n")
        self._read(process)

    def close(self) -> None:
        """End the process and all it started."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return
        known = processes.tree(process.pid)
        processes.resume(process.pid)
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            process.stdin.close()
            process.wait(30)
        processes.end(known)
        process.wait()
        process.stdout.close()

    def _read(self, process: subprocess.Popen[str]) -> None:
        own, busy, started = processes.cpu_seconds(process.pid), processes.busy_seconds(), time.perf_counter()
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            self.error = self._reason()
            return
        elapsed = time.perf_counter() - started
        others = processes.busy_seconds() - busy - (processes.cpu_seconds(process.pid) - own)
        answer = json.loads(line)
        answer["other_load"] = max(0.0, others / (elapsed * (os.cpu_count() or 1)))
        self.answers.append(answer)
        processes.suspend(process.pid)

    def _reason(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it ended without a word"
