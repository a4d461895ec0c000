"""The processes of a variant: peak memory, CPU time, and putting them to sleep while others are measured."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil


def tree(pid: int) -> list[psutil.Process]:
    """A process and everything it started that is alive."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def peak_memory(pid: int) -> int:
    """The peak resident bytes of every process of a tree, summed. Pages that they share count in each of them."""
    return sum(_peak(process) for process in _each(pid))


def forget_peak(pid: int) -> None:
    """Let :func:`peak_memory` count from now on, where the system can."""
    for process in _each(pid):
        with contextlib.suppress(OSError):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def cpu_seconds(pid: int) -> float:
    """CPU seconds that the processes of a tree have used so far."""
    return sum(times.user + times.system for process in _each(pid) for times in [process.cpu_times()])


def busy_seconds() -> float:
    """CPU seconds that everything on this machine has used so far."""
    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)


def suspend(pid: int) -> None:
    """Stop every process of a tree, so that not even its background threads run."""
    for process in _each(pid):
        process.suspend()


def resume(pid: int) -> None:
    """Let a suspended tree go on."""
    for process in reversed(list(_each(pid))):
        process.resume()


def end(known: Iterable[psutil.Process]) -> None:
    """Kill those of the processes that are still there."""
    for process in known:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _each(pid: int) -> Iterator[psutil.Process]:
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield process


def _peak(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else process.memory_info().rss
