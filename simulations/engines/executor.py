"""What trains the cohorts of a round: this process, or Ray actors that each hold the backbone once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedlora.cohort import Member, Trained
from fedlora.trainer import Frozen, Trainer


@dataclass(frozen=True)
class Work:
    """A cohort to train.

    Attributes:
        frozen: what its members share beside the backbone.
        members: the clients.
        cost: how long it takes relative to others: the longest is started first.
    """

    frozen: Frozen
    members: Sequence[Member]
    cost: float


class Executor(Protocol):
    """Trains cohorts."""

    @property
    def halved(self) -> int:
        """How often a cohort did not fit the memory and was cut in two, since the start of the run."""
        ...

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, list[Trained]]]:
        """Train every cohort; yields the number of each and its members' results, as they are ready."""
        ...


class LocalExecutor:
    """This process, one cohort after the other."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def halved(self) -> int:
        """How often a cohort did not fit the memory."""
        return self.trainer.halved

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, list[Trained]]]:
        """Train in order."""
        for number, work in enumerate(works):
            self.trainer.hold(work.frozen)
            yield number, self.trainer.train(work.members)
