"""What is measured: named workloads, and grids of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from fedlora.errors import InputError

FIXED = 48


@dataclass(frozen=True)
class Workload:
    """One round of local training, the same for every variant.

    Attributes:
        name: how the tables call it.
        clients: clients that train in a round.
        steps: optimiser steps of each client.
        rows: rows of each step.
        length: most tokens of a row, special tokens included.
        real: rows keep their own length; otherwise every row has exactly ``length`` tokens and nothing is padding.
        backbone: ``minilm``, or ``<layers>x<hidden>`` for a BERT of that size with random weights.
    """

    name: str
    clients: int
    steps: int
    rows: int
    length: int = FIXED
    real: bool = False
    backbone: str = "minilm"

    @property
    def total_rows(self) -> int:
        """Rows of a round."""
        return self.clients * self.steps * self.rows

    @property
    def described(self) -> str:
        """The workload in words."""
        lengths = f"real lengths up to {self.length}" if self.real else f"{self.length}"
        model = "MiniLM-L6" if self.backbone == "minilm" else f"random BERT {self.backbone}"
        return f"{self.clients} clients x {self.steps} steps x {self.rows} rows x {lengths} tokens, {model}"

    def scaled(self, scale: float) -> Workload:
        """The same with ``scale`` times as many clients, at least two."""
        return replace(self, clients=max(2, round(self.clients * scale)))


NAMED = (
    Workload("small", 128, 4, 4),
    Workload("small-real", 128, 4, 4, real=True),
    Workload("medium", 64, 4, 16),
    Workload("medium-real", 64, 4, 16, real=True),
    Workload("overhead-4x48", 1000, 2, 4, 48, backbone="2x128"),
    Workload("overhead-4x16", 1000, 2, 4, 16, backbone="2x128"),
    Workload("overhead-1x16", 1000, 2, 1, 16, backbone="2x128"),
)


def grid(
    clients: Iterable[int],
    steps: Iterable[int],
    rows: Iterable[int],
    lengths: Iterable[int],
    backbones: Iterable[str],
    real: bool,
) -> tuple[Workload, ...]:
    """Every combination, named after what it is."""
    return tuple(
        Workload(f"{model}-{c}c{s}s{r}r{n}t{'-real' if real else ''}", c, s, r, n, real, model)
        for model, n, r, s, c in product(backbones, lengths, rows, steps, clients)
    )


def chosen(workloads: Sequence[Workload], names: Sequence[str]) -> tuple[Workload, ...]:
    """The workloads of these names, or of these first words (``overhead``); all of them for no names.

    Raises:
        InputError: there is none of a name.
    """
    found: list[Workload] = []
    for name in names:
        exact = [w for w in workloads if w.name == name] or [w for w in workloads if w.name.startswith(f"{name}-")]
        if not exact:
            raise InputError(f"There is no workload '{name}'. Known: {', '.join(w.name for w in workloads)}.")
        found += exact
    return tuple(dict.fromkeys(found)) if names else tuple(workloads)


def size_of(backbone: str) -> tuple[int, int]:
    """Layers and hidden size of a random backbone ``<layers>x<hidden>``.

    Raises:
        InputError: it is written otherwise.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", backbone)
    if match is None or int(match[2]) % 16:
        raise InputError(
            f"Backbone '{backbone}' is neither minilm nor <layers>x<hidden> with a hidden size divisible by 16."
        )
    return int(match[1]), int(match[2])
