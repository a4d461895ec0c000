"""The actor: a trainer in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from fedlora.cohort import Trained
from fedlora.trainer import Frozen, Trainer
from simulations.engines.shipping import Parcel, ship, unship


class TrainerProcess:
    """Holds the trainer of one run at a time, and what the cohorts of a round share."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.trainer: Any = None
        self._frozen: tuple[str, Frozen] | None = None

    def hold(self, payload: Parcel) -> None:
        """Take the trainer of a run in the place of the last one."""
        import ray

        self.trainer = self._frozen = None
        arrays = [ray.get(array) if isinstance(array, ray.ObjectRef) else array for array in payload.arrays]
        trainer: Trainer = unship(Parcel(payload.pickled, arrays))
        if ray.get_gpu_ids() and torch.cuda.is_available():
            trainer.model.to("cuda")
        self.trainer = trainer

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
        return ship(joined(trained)), self.trainer.halved - before


def joined(trained: Sequence[Trained]) -> dict[str, Any]:
    """Results with the states stacked: one array a key instead of one a client and key."""
    good = [result for result in trained if result.failure is None]
    keys = good[0].state if good else ()
    return {
        "states": {key: torch.stack([result.state[key] for result in good]) for key in keys},
        "losses": [result.loss for result in trained],
        "moments": [result.moments for result in trained],
        "failures": [result.failure for result in trained],
    }


def separate(stacked: dict[str, Any]) -> list[Trained]:
    """The opposite of :func:`joined`."""
    results, place = [], 0
    for loss, moments, failure in zip(stacked["losses"], stacked["moments"], stacked["failures"], strict=True):
        state = {} if failure else {key: value[place] for key, value in stacked["states"].items()}
        place += failure is None
        results.append(Trained(state, loss, moments, failure))
    return results
