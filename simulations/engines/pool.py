"""Ray and the actors on it: started for the first run of a process that needs them, and kept for those after it.

An actor holds the trainer of one run at a time. What two runs have in common (frozen weights, rows) lies in Ray's
object store once, and is not sent again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlora.config import EngineConfig
from fedlora.trainer import Trainer
from simulations.engines.cluster import connect, gpus_of_a_worker
from simulations.engines.process import TrainerProcess
from simulations.engines.shipping import Parcel, ship

INLINE = 1 << 16
"""Arrays of at most this many bytes travel with the pickle."""


class ActorPool:
    """Actors, each a process with its share of the cores and GPUs.

    Attributes:
        actors: handles of Ray, in order.
        loading: what is ready when every actor has the trainer.
    """

    def __init__(self, engine: EngineConfig) -> None:
        """Start ``engine.workers`` actors, here or on the Ray cluster at ``engine.address``.

        Raises:
            InputError: there is no cluster at that address, or it cannot hold so many actors.
        """
        import ray

        self.ray: Any = ray
        self.engine, self.threads = engine, engine.threads or 1
        self.actors: list[Any] = []
        self.loading: list[Any] = []
        self._payload: Any = None
        self._objects: dict[tuple[int, int], tuple[np.ndarray, Any]] = {}
        self._started = connect(engine)
        try:
            self._gpus = gpus_of_a_worker(engine, ray.nodes())
            self.actors = [self._actor() for _ in range(engine.workers or 1)]
        except BaseException:
            self.close()
            raise

    def serves(self, engine: EngineConfig) -> bool:
        """Whether these are the actors that ``engine`` asks for."""
        wanted = (engine.workers, engine.threads or 1, engine.address)
        return wanted == (self.engine.workers, self.threads, self.engine.address)

    def hold(self, trainer: Trainer) -> None:
        """Give every actor ``trainer``; large arrays that the last one had, too, are not sent again."""
        device = str(trainer.model.device)
        trainer.model.to("cpu")  # whose memory processes can share; every actor moves its own to its GPU
        try:
            parcel = ship(trainer, {id(tensor) for tensor in trainer.model.loadable()})
        finally:
            trainer.model.to(device)
        self._payload = self.ray.put(Parcel(parcel.pickled, self._put(parcel.arrays)))
        self.loading = [actor.hold.remote(self._payload) for actor in self.actors]

    def replaced(self, dead: Any) -> Any:
        """Another actor in the place of ``dead``, which is ended."""
        self.ray.kill(dead)  # it may only be out of reach
        fresh = self._actor()
        if self._payload is not None:
            fresh.hold.remote(self._payload)
        self.actors[self.actors.index(dead)] = fresh
        return fresh

    def close(self) -> None:
        """End the actors, and Ray or the connection to it if it was made here."""
        for actor in self.actors:
            self.ray.kill(actor)
        self.actors, self.loading, self._objects, self._payload = [], [], {}, None
        if self._started:
            self._started = False
            self.ray.shutdown()

    def _actor(self) -> Any:
        process = self.ray.remote(TrainerProcess)
        return process.options(num_cpus=self.threads, num_gpus=self._gpus).remote(self.threads)

    def _put(self, arrays: list[np.ndarray]) -> list[Any]:
        """The large ones as objects in the store: what is there stays, what is not needed any more goes."""
        places = [(array.__array_interface__["data"][0], array.nbytes) for array in arrays]
        kept = {place: self._objects[place] for place in places if place in self._objects}
        self._objects = kept  # before others are put, so that their memory is free; arrays hold on to their address
        for place, array in zip(places, arrays, strict=True):
            if array.nbytes > INLINE and place not in kept:
                kept[place] = array, self.ray.put(array)
        return [kept[place][1] if place in kept else array for place, array in zip(places, arrays, strict=True)]


class Pools:
    """The pool that the runs of one process share, once one of them needs it. To be closed after the last."""

    def __init__(self) -> None:
        self._pool: ActorPool | None = None

    def get(self, engine: EngineConfig) -> ActorPool:
        """The actors that ``engine`` asks for; others are ended first."""
        if self._pool is None or not self._pool.serves(engine):
            self.close()
            self._pool = ActorPool(engine)
        return self._pool

    def close(self) -> None:
        """End what was started."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
