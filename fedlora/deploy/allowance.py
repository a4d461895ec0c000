"""What a client has done and given away so far, by run: counters on disk that no restart takes back."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Used:
    """Counters of one run.

    Attributes:
        trainings: rounds trained, each time that one was repeated included.
        download: bytes of all messages received.
        upload: bytes of all messages sent.
        epsilon: that the run may cost, with everything it has released.
        delta: for which ``epsilon`` holds.
        own_noise: how often the client has released an update whose own noise was so large, by noise multiplier.
    """

    trainings: int = 0
    download: int = 0
    upload: int = 0
    epsilon: float = 0.0
    delta: float = 0.0
    own_noise: dict[str, int] = field(default_factory=dict)


class Allowance:
    """The counters of all runs of a client, in one file of its home folder."""

    def __init__(self, home: Path) -> None:
        self.path = home / "allowance.json"

    def used(self, run: str) -> Used:
        """The counters of ``run``."""
        return self._read().get(run, Used())

    def elsewhere(self, run: str) -> tuple[float, float]:
        """Epsilon and delta of all other runs together, which add up."""
        others = [used for name, used in self._read().items() if name != run]
        return sum(used.epsilon for used in others), sum(used.delta for used in others)

    @contextmanager
    def changing(self, run: str) -> Iterator[Used]:
        """The counters of ``run``, to be changed by nobody else meanwhile; an error leaves them as they were."""
        from fedlora.store import write_atomically

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            runs = self._read()
            yield runs.setdefault(run, Used())
            write_atomically(self.path, json.dumps({name: asdict(used) for name, used in runs.items()}, indent=1))

    def _read(self) -> dict[str, Used]:
        if not self.path.exists():
            return {}
        return {name: Used(**values) for name, values in json.loads(self.path.read_text()).items()}
