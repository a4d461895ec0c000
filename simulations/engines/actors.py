"""Cohorts on Ray actors: one actor for each GPU or slice of the CPU, each holding the backbone once.

On one machine the frozen weights and the rows lie in Ray's object store and all actors map the same memory. A cohort
goes to whoever is free, the longest first; which clients form a cohort was settled before, so results do not depend on
how many actors there are.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from fedlora.cohort import Trained
from fedlora.errors import FedloraError
from fedlora.trainer import Trainer
from simulations.engines.executor import Work
from simulations.engines.pool import ActorPool
from simulations.engines.process import separate
from simulations.engines.shipping import ship, unship

log = logging.getLogger("fedlora")
TRIES = 2
"""A cohort whose actor dies is trained once more; then its clients count as failed."""


class RayExecutor:
    """Sends cohorts to actors.

    Attributes:
        halved: how often a cohort did not fit the memory and was cut in two.
    """

    def __init__(self, trainer: Trainer, pool: ActorPool) -> None:
        """Train on the actors of ``pool``, which get ``trainer``."""
        import ray

        self.ray: Any = ray
        self.halved = 0
        self.pool = pool
        self._frozen: tuple[str, Any] | None = None
        self._awaited = False
        pool.hold(trainer)

    def describe(self) -> list[dict[str, Any]]:
        """Where each actor runs; waits until all have started.

        Raises:
            FedloraError: one cannot start.
        """
        try:
            self.ray.get(self.pool.loading)
            return self.ray.get([actor.describe.remote() for actor in self.pool.actors])
        except self.ray.exceptions.RayActorError as error:
            raise FedloraError(f"A worker did not start: {_last_line(error)}") from error

    def _await_start(self) -> None:
        """Wait for the actors before the first cohort: they started while the first evaluation ran here."""
        if not self._awaited:
            self._awaited = True
            for number, place in enumerate(self.describe()):
                log.info("worker %d: %s", number, place)

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, list[Trained]]]:
        """Train every cohort, the longest first; yields results as they are ready."""
        self._await_start()
        lost = self.ray.exceptions
        waiting = deque(sorted(range(len(works)), key=lambda number: -works[number].cost))
        tries = [0] * len(works)
        idle, busy = list(self.pool.actors), {}
        while waiting or busy:
            while waiting and idle:
                number, actor = waiting.popleft(), idle.pop()
                tries[number] += 1
                busy[self._send(actor, works[number])] = number, actor
            (ready,), _ = self.ray.wait(list(busy), num_returns=1)
            number, actor = busy.pop(ready)
            try:
                parcel, halved = self.ray.get(ready)
            except (lost.RayActorError, lost.OutOfMemoryError, lost.ObjectLostError) as error:
                log.warning("a worker died and is started anew: %s", _last_line(error))
                idle.append(self.pool.replaced(actor))
                if tries[number] < TRIES:
                    waiting.appendleft(number)
                    continue
                reason = f"the process that trained it died {TRIES} times (out of memory?): {_last_line(error)}"
                yield number, [Trained({}, math.nan, {}, reason) for _ in works[number].members]
                continue
            except lost.RayTaskError as error:
                raise error.as_instanceof_cause() from error
            idle.append(actor)
            self.halved += halved
            yield number, separate(unship(parcel))

    def _send(self, actor: Any, work: Work) -> Any:
        key = repr(work.frozen.key)
        if self._frozen is None or self._frozen[0] != key:
            self._frozen = key, self.ray.put(ship(work.frozen))
        return actor.train.remote(key, self._frozen[1], ship(list(work.members)))


def _last_line(error: BaseException) -> str:
    """What an error of Ray says, without the traceback that it quotes."""
    return str(error).strip().splitlines()[-1].strip()
