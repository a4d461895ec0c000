"""Base corrections: the full-rank part of an exact aggregate, added beside the frozen backbone.

A server that folds residuals into the base (FedEx-LoRA) must bring every client to the same base. A client holds the
sum of all residuals up to some version; a message carries, module by module, either the low-rank residuals of the
versions it missed or the dense sum, whichever is smaller.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.lowrank import LowRank

Dense = dict[str, Tensor]


@dataclass(frozen=True)
class CorrectionUpdate:
    """What brings a client from base ``since`` (``None``: unknown) to base ``until``.

    Attributes:
        dense: module -> the whole sum ``[m, n]`` at version ``until``.
        factored: module -> one residual for each missed version, in order.
    """

    since: int | None
    until: int
    dense: Dense
    factored: dict[str, list[LowRank]]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor to send, in a fixed order."""
        tensors = {f"{module}.dense": value for module, value in self.dense.items()}
        for module, residuals in self.factored.items():
            for i, residual in enumerate(residuals):
                tensors[f"{module}.{i}.left"] = residual.left
                tensors[f"{module}.{i}.right"] = residual.right
        return tensors

    def header(self) -> str:
        """JSON that lets the receiver lay out the tensors: versions, and the ranks of each factored module."""
        ranks = [[residual.rank for residual in residuals] for residuals in self.factored.values()]
        return json.dumps([self.since, self.until, list(self.dense), list(self.factored), ranks], separators=(",", ":"))


def layout_of(header: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an update; ``shapes`` are ``{module: (m, n)}`` of the model.

    Raises:
        FedloraError: it is no header, or it speaks of a module that the model does not have.
    """
    _, _, dense, factored, ranks = _parsed(header)
    unknown = [module for module in [*dense, *factored] if module not in shapes]
    if unknown:
        raise FedloraError(f"base correction for unknown modules {reprlib.repr(unknown)}")
    layout: dict[str, tuple[int, ...]] = {f"{module}.dense": shapes[module] for module in dense}
    for module, of_module in zip(factored, ranks, strict=True):
        m, n = shapes[module]
        for i, rank in enumerate(of_module):
            layout[f"{module}.{i}.left"] = (m, rank)
            layout[f"{module}.{i}.right"] = (rank, n)
    return layout


def apply_update(held: Mapping[str, Tensor], header: str, tensors: Mapping[str, Tensor]) -> Dense:
    """Return the new sum: dense parts replace, residuals are added one version after the other in fp32."""
    _, _, dense, factored, ranks = _parsed(header)
    result = dict(held)
    for module in dense:
        result[module] = tensors[f"{module}.dense"]
    for module, of_module in zip(factored, ranks, strict=True):
        for i in range(len(of_module)):
            residual = tensors[f"{module}.{i}.left"] @ tensors[f"{module}.{i}.right"]
            result[module] = result[module] + residual if module in result else residual
    return result


def versions(header: str) -> tuple[int | None, int]:
    """``(since, until)`` of an update.

    Raises:
        FedloraError: it is no header.
    """
    since, until, *_ = _parsed(header)
    return since, until


def _parsed(header: str) -> tuple[int | None, int, list[str], list[str], list[list[int]]]:
    """What :meth:`CorrectionUpdate.header` wrote, or an error for any other text."""
    try:
        since, until, dense, factored, ranks = json.loads(header)
    except (ValueError, TypeError, RecursionError):
        raise FedloraError(f"{reprlib.repr(header)} describes no base correction") from None
    modules = [*dense, *factored] if isinstance(dense, list) and isinstance(factored, list) else [None]
    fits = (
        type(until) is int
        and (since is None or (type(since) is int and 0 <= since < until))
        and until > 0
        and modules
        and all(type(module) is str for module in modules)
        and len(set(modules)) == len(modules)
        and isinstance(ranks, list)
        and len(ranks) == len(factored)
        and all(
            isinstance(of_module, list) and all(type(r) is int and r >= 0 for r in of_module) for of_module in ranks
        )
    )
    if not fits:
        raise FedloraError(f"{reprlib.repr(header)} describes no base correction")
    return since, until, dense, factored, ranks


class CorrectionLog:
    """The server's side: the sum so far, and the recent residuals that are still cheaper to send than the sum."""

    def __init__(self) -> None:
        self.version = 0
        self.total: Dense = {}
        self.recent: dict[int, dict[str, LowRank]] = {}

    def append(self, residuals: Mapping[str, LowRank]) -> None:
        """Add one round's residuals and make a new version."""
        self.version += 1
        self.recent[self.version] = dict(residuals)
        for module, residual in residuals.items():
            dense = residual.dense()
            self.total[module] = self.total[module] + dense if module in self.total else dense
        ranks = dict.fromkeys(residuals, 0)
        for version in sorted(self.recent, reverse=True):
            for module, residual in self.recent[version].items():
                ranks[module] += residual.factored_size()
            if all(ranks[module] >= residual.dense_size() for module, residual in residuals.items()):
                for old in [v for v in self.recent if v <= version]:
                    del self.recent[old]
                break

    def update_since(self, since: int | None) -> CorrectionUpdate | None:
        """The cheapest update for a client at version ``since``; ``None`` when it is up to date."""
        if since == self.version or self.version == 0:  # nobody can hold anything else than the first base
            return None
        missed = [] if since is None else list(range(since + 1, self.version + 1))
        known = bool(missed) and all(version in self.recent for version in missed)
        dense: Dense = {}
        factored: dict[str, list[LowRank]] = {}
        for module, total in self.total.items():
            residuals = [self.recent[version][module] for version in missed] if known else []
            if known and sum(residual.factored_size() for residual in residuals) < total.numel():
                factored[module] = residuals
            else:
                dense[module] = total
        return CorrectionUpdate(since, self.version, dense, factored)

    def state_dict(self) -> dict[str, object]:
        """Plain tensors and numbers for a checkpoint."""
        recent = {v: {m: (x.left, x.right) for m, x in of.items()} for v, of in self.recent.items()}
        return {"version": self.version, "total": dict(self.total), "recent": recent}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore :meth:`state_dict`."""
        self.version = int(state["version"])  # pyright: ignore
        self.total = dict(state["total"])  # pyright: ignore
        self.recent = {
            version: {module: LowRank(*factors) for module, factors in of.items()}
            for version, of in state["recent"].items()  # pyright: ignore
        }
