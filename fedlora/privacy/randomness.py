"""Where the randomness of differential privacy comes from: a seed in a simulation, the operating system otherwise.

Whoever knows the seed can subtract the noise. So a simulation is no private release, whatever its epsilon, and a
deployed client has no seed: its draws cannot be repeated by anybody, itself included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedlora.seeding import torch_generator

SUMMANDS = 4
"""Normal numbers that are added up for each of the system's, against attacks on their last bits: Holohan and Braghin
2021 (arXiv 2107.10138), as in the secure mode of Opacus."""


class Randomness(Protocol):
    """Draws of one client in one round."""

    def chosen(self, rows: int, rate: float) -> np.ndarray:
        """Poisson sampling: places of ``rows`` rows of which each is drawn with probability ``rate``; maybe none."""
        ...

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        """Independent normal numbers of mean 0, fp32, on the CPU."""
        ...


class Seeded:
    """A simulation's draws: those of Opacus for generators that are seeded alike."""

    def __init__(self, seed: int) -> None:
        self._rows, self._noise = torch_generator(seed, "rows"), torch_generator(seed, "noise")

    def chosen(self, rows: int, rate: float) -> np.ndarray:
        """See :class:`Randomness`."""
        return (torch.rand(rows, generator=self._rows) < rate).nonzero().flatten().numpy()

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        """See :class:`Randomness`."""
        if std == 0:
            return torch.zeros(tuple(shape))
        return torch.normal(0.0, std, tuple(shape), generator=self._noise)


class System:
    """A deployed client's draws: from its operating system's generator for cryptography."""

    def chosen(self, rows: int, rate: float) -> np.ndarray:
        """See :class:`Randomness`."""
        return np.flatnonzero(_uniform(rows) < rate)

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        """See :class:`Randomness`."""
        each = torch.special.ndtri(torch.from_numpy(_uniform(SUMMANDS * math.prod(shape)))).view(SUMMANDS, *shape)
        return (each.sum(dim=0) * (std / math.sqrt(SUMMANDS))).float()


def _uniform(count: int) -> np.ndarray:
    """Numbers between 0 and 1, both excluded, of 53 random bits each."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53
