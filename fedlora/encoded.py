"""Rows as arrays a model can read, made once per data set and cached on disk under a key of all they depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class EncodedRows:
    """All rows of a data set.

    Attributes:
        offsets: row i is the piece ``offsets[i]:offsets[i + 1]`` of every ragged array ``[rows + 1]``, int64.
        ragged: arrays of one value a token, all rows one after the other ``{name: [tokens]}`` (``input_ids``, ...).
        fixed: arrays of equal size for each row ``{name: [rows, ...]}`` (``target``, ``pixels``, ...).
        truncated: rows that were longer than allowed.
    """

    offsets: np.ndarray
    ragged: Mapping[str, np.ndarray] = field(default_factory=dict)
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict)
    truncated: int = 0

    @classmethod
    def from_lists(
        cls, ragged: Mapping[str, Sequence[Sequence[int]]], fixed: Mapping[str, Any], truncated: int = 0
    ) -> EncodedRows:
        """Flatten lists of numbers, one list a row; every ragged name has the same lengths."""
        first = next(iter(ragged.values()))
        lengths = np.fromiter((len(row) for row in first), dtype=np.int64, count=len(first))
        flat = {name: _flatten(rows) for name, rows in ragged.items()}
        arrays = {name: np.asarray(values) for name, values in fixed.items()}
        return cls(np.concatenate([[0], np.cumsum(lengths)]), flat, arrays, truncated)

    @classmethod
    def from_arrays(cls, **fixed: Any) -> EncodedRows:
        """Rows without a length of their own, such as images; each counts as one token."""
        arrays = {name: np.asarray(values) for name, values in fixed.items()}
        return cls(np.arange(len(next(iter(arrays.values()))) + 1), {}, arrays)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def piece(self, name: str, row: int) -> np.ndarray:
        """One row of a ragged array ``[tokens of the row]``."""
        return self.ragged[name][self.offsets[row] : self.offsets[row + 1]]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each of ``rows``."""
        return self.offsets[rows + 1] - self.offsets[rows]


def _flatten(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, dtype=np.int32) for row in rows)])


def cache_folder() -> Path:
    """``$FEDLORA_CACHE``, or ``~/.cache/fedlora``."""
    return Path(os.environ.get("FEDLORA_CACHE", Path.home() / ".cache" / "fedlora"))


def cached(key_parts: Sequence[str | bytes], make: Callable[[], EncodedRows]) -> EncodedRows:
    """Return the cached rows of this key, or make and store them (atomically: two runs may race)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in key_parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\x1f")
    path = cache_folder() / "rows" / f"{digest.hexdigest()}.npz"
    if path.exists():
        with np.load(path) as stored:
            return EncodedRows(
                stored["offsets"], _named(stored, "ragged."), _named(stored, "fixed."), int(stored["truncated"])
            )
    rows = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"offsets": rows.offsets, "truncated": np.int64(rows.truncated)}
    arrays |= {f"ragged.{name}": values for name, values in rows.ragged.items()}
    arrays |= {f"fixed.{name}": values for name, values in rows.fixed.items()}
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
    return rows


def _named(stored: Any, prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}
