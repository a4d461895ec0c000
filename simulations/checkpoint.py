"""Checkpoints: everything the server side needs to go on with the same bits after a crash.

Client state is not in it: the client store is written so that a round can be run again (see :mod:`fedlora.store`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedlora import wire
from fedlora.adapters import State
from fedlora.ledger import Ledger
from strategies.base import FederatedStrategy

ARRAY, RECORD = "__ndarray__", "__arrayrecord__"


@dataclass(frozen=True)
class Checkpoint:
    """State of the server side after ``round``.

    Attributes:
        round: last completed round (0: only the start has been evaluated).
        state: the global shared tensors.
        frozen: the frozen factors as they are now.
        setup: whether clients are sent them.
        strategy: the strategy's own state.
        privacy: the state of the privacy mechanism around it.
        delivered: clients that hold the setup.
        capabilities: what clients have announced, as they announced it.
        best: the best evaluation so far.
        epsilons: what clients have said that they have spent.
    """

    round: int
    state: State
    frozen: State
    setup: bool
    strategy: dict[str, Any]
    privacy: dict[str, Any]
    delivered: list[str]
    capabilities: dict[str, dict[str, Any]]
    best: dict[str, Any] | None
    epsilons: dict[str, float]


def save(folder: Path, checkpoint: Checkpoint, ledger: Ledger, since_round: int) -> None:
    """Write a checkpoint atomically, with the ledger's entries after ``since_round`` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    ledger.since(since_round).write(folder / f"ledger_{checkpoint.round:06d}.parquet")
    temporary = folder / f".state.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        torch.save(vars(checkpoint), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "state.pt")


def load(folder: Path) -> tuple[Checkpoint, Ledger] | None:
    """Read the newest checkpoint and the ledger up to it, or ``None`` if there is none."""
    path = folder / "state.pt"
    if not path.exists():
        return None
    checkpoint = Checkpoint(**torch.load(path, weights_only=True))
    parts = [
        p for p in sorted(folder.glob("ledger_*.parquet")) if int(p.stem.removeprefix("ledger_")) <= checkpoint.round
    ]
    return checkpoint, Ledger(entry for part in parts for entry in Ledger.read(part).entries)


def remove(folder: Path) -> None:
    """Drop the checkpoint of a finished run."""
    shutil.rmtree(folder, ignore_errors=True)


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """State of any strategy: its own ``state_dict``, or for Flower's the attributes that are plain data."""
    if isinstance(strategy, FederatedStrategy):
        return strategy.state_dict()
    return {name: encoded for name, value in vars(strategy).items() if (encoded := _encode(value)) is not _OPAQUE}


def restore_strategy(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Restore :func:`strategy_state`."""
    if isinstance(strategy, FederatedStrategy):
        strategy.load_state_dict(state)
        return
    for name, value in state.items():
        setattr(strategy, name, _decode(value))


_OPAQUE = object()


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return {ARRAY: torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, ArrayRecord):
        return {RECORD: wire.from_record(value)}
    if isinstance(value, list | tuple):
        items = [_encode(item) for item in value]
        return _OPAQUE if any(item is _OPAQUE for item in items) else type(value)(items)
    if isinstance(value, dict):
        encoded = {key: _encode(item) for key, item in value.items()}
        return _OPAQUE if any(item is _OPAQUE for item in encoded.values()) else encoded
    return _OPAQUE


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if ARRAY in value:
            return cast(torch.Tensor, value[ARRAY]).numpy()
        if RECORD in value:
            return wire.to_record(value[RECORD])
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_decode(item) for item in value)
    return value
