"""Ray actors that live as long as a run: one for each GPU or slice of the CPU, each holding the backbone once.

On one machine the frozen weights and the rows lie in Ray's object store and all actors map the same memory. A cohort
goes to whoever is free, the longest first; which clients form a cohort was settled before, so results do not depend on
how many actors there are.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fedlora.cohort import Trained
from fedlora.config import EngineConfig
from fedlora.errors import FedloraError
from fedlora.trainer import Frozen, Trainer
from simulations.engines.cluster import connect, gpus_of_a_worker
from simulations.engines.executor import Work
from simulations.engines.shipping import Parcel, ship, unship

log = logging.getLogger("fedlora")
TRIES = 2
"""A cohort whose actor dies is trained once more; then its clients count as failed."""


class TrainerProcess:
    """The actor: a trainer in a process of its own."""

    def __init__(self, payload: Parcel, threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        self.trainer: Trainer = unship(payload)
        if ray.get_gpu_ids() and torch.cuda.is_available():
            self.trainer.model.to("cuda")
        self._frozen: tuple[str, Frozen] | None = None

    def describe(self) -> dict[str, Any]:
        """Where this actor runs: process, node, device, GPU ids of Ray, ``CUDA_VISIBLE_DEVICES`` and threads."""
        import ray

        context = ray.get_runtime_context()
        return {
            "pid": os.getpid(),
            "node": context.get_node_id(),
            "device": str(self.trainer.model.device),
            "gpus": [str(i) for i in ray.get_gpu_ids()],
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "threads": torch.get_num_threads(),
        }

    def train(self, key: str, frozen: Parcel, members: Parcel) -> tuple[Parcel, int]:
        """Train a cohort on the frozen content called ``key``; returns the results and how often it was halved."""
        if self._frozen is None or self._frozen[0] != key:
            self._frozen = key, unship(frozen)
        self.trainer.hold(self._frozen[1])
        before = self.trainer.halved
        trained = self.trainer.train(unship(members))
        return ship(_joined(trained)), self.trainer.halved - before


class RayExecutor:
    """Sends cohorts to actors.

    Attributes:
        halved: how often a cohort did not fit the memory and was cut in two.
    """

    def __init__(self, trainer: Trainer, engine: EngineConfig) -> None:
        """Start ``engine.workers`` actors, here or on the Ray cluster at ``engine.address``.

        Raises:
            InputError: there is no cluster at that address, or it cannot hold so many actors.
        """
        import ray

        self.ray: Any = ray
        self.halved = 0
        self.threads = engine.threads or 1
        self._frozen: tuple[str, Any] | None = None
        self._actors: list[Any] = []
        self._awaited = False
        self._started = connect(engine)
        try:
            self._gpus = gpus_of_a_worker(engine, ray.nodes())
            self._payload = ray.put(_shipped(trainer))
            self._actors = [self._actor() for _ in range(engine.workers or 1)]
        except BaseException:
            self.close()
            raise

    def describe(self) -> list[dict[str, Any]]:
        """Where each actor runs; waits until all have started.

        Raises:
            FedloraError: one cannot start.
        """
        try:
            return self.ray.get([actor.describe.remote() for actor in self._actors])
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
        idle, busy = list(self._actors), {}
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
                idle.append(self._replaced(actor))
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
            yield number, _separate(unship(parcel))

    def close(self) -> None:
        """End the actors, and Ray or the connection to it if it was made here."""
        for actor in self._actors:
            self.ray.kill(actor)
        self._actors = []
        if self._started:
            self._started = False
            self.ray.shutdown()

    def _send(self, actor: Any, work: Work) -> Any:
        key = repr(work.frozen.key)
        if self._frozen is None or self._frozen[0] != key:
            self._frozen = key, self.ray.put(ship(work.frozen))
        return actor.train.remote(key, self._frozen[1], ship(list(work.members)))

    def _actor(self) -> Any:
        process = self.ray.remote(TrainerProcess)
        return process.options(num_cpus=self.threads, num_gpus=self._gpus).remote(self._payload, self.threads)

    def _replaced(self, dead: Any) -> Any:
        self.ray.kill(dead)  # it may only be out of reach
        fresh = self._actor()
        self._actors[self._actors.index(dead)] = fresh
        return fresh


def _last_line(error: BaseException) -> str:
    """What an error of Ray says, without the traceback that it quotes."""
    return str(error).strip().splitlines()[-1].strip()


def _shipped(trainer: Trainer) -> Parcel:
    """The trainer with its model on the CPU, whose memory processes can share; every actor moves its own to its GPU."""
    device = str(trainer.model.device)
    trainer.model.to("cpu")
    try:
        return ship(trainer, {id(tensor) for tensor in trainer.model.loadable()})
    finally:
        trainer.model.to(device)


def _joined(trained: Sequence[Trained]) -> dict[str, Any]:
    """Results with the states stacked: one array a key instead of one a client and key."""
    good = [result for result in trained if result.failure is None]
    keys = good[0].state if good else ()
    return {
        "states": {key: torch.stack([result.state[key] for result in good]) for key in keys},
        "losses": [result.loss for result in trained],
        "moments": [result.moments for result in trained],
        "failures": [result.failure for result in trained],
    }


def _separate(joined: dict[str, Any]) -> list[Trained]:
    """The opposite of :func:`_joined`."""
    results, place = [], 0
    for loss, moments, failure in zip(joined["losses"], joined["moments"], joined["failures"], strict=True):
        state = {} if failure else {key: value[place] for key, value in joined["states"].items()}
        place += failure is None
        results.append(Trained(state, loss, moments, failure))
    return results
