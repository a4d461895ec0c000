"""Tokenised rows in flat arrays, cached on disk under a key of everything they depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TokenisedRows:
    """All rows of a data set as token ids.

    Attributes:
        flat: token ids of all rows, one after the other ``[tokens]``, int32.
        offsets: row i is ``flat[offsets[i]:offsets[i + 1]]`` ``[rows + 1]``, int64.
        targets: one int64 a row: the class id, or for language models the position where the completion starts.
        segments: where the second text of a pair starts ``[rows]``, or ``None``.
        truncated: rows that were longer than allowed.
    """

    flat: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None
    truncated: int

    @classmethod
    def from_lists(
        cls,
        ids: Sequence[Sequence[int]],
        targets: Sequence[int] | np.ndarray,
        segments: Sequence[int] | None = None,
        truncated: int = 0,
    ) -> TokenisedRows:
        """Flatten lists of token ids."""
        lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
        flat = np.concatenate([np.asarray(row, dtype=np.int32) for row in ids]) if len(ids) else np.zeros(0, np.int32)
        return cls(
            flat,
            np.concatenate([[0], np.cumsum(lengths)]),
            np.asarray(targets, dtype=np.int64),
            None if segments is None else np.asarray(segments, dtype=np.int64),
            truncated,
        )

    def ids(self, row: int) -> np.ndarray:
        """Token ids of one row."""
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each of ``rows``."""
        return self.offsets[rows + 1] - self.offsets[rows]


def cache_folder() -> Path:
    """``$FEDLORA_CACHE``, or ``~/.cache/fedlora``."""
    return Path(os.environ.get("FEDLORA_CACHE", Path.home() / ".cache" / "fedlora"))


def cached(key_parts: Sequence[str | bytes], make: Callable[[], TokenisedRows]) -> TokenisedRows:
    """Return the cached rows of this key, or make and store them (atomically: two runs may race)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in key_parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\x1f")
    path = cache_folder() / "tokens" / f"{digest.hexdigest()}.npz"
    if path.exists():
        with np.load(path) as stored:
            segments = stored.get("segments")
            return TokenisedRows(
                stored["flat"], stored["offsets"], stored["targets"], segments, int(stored["truncated"])
            )
    rows = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        "flat": rows.flat,
        "offsets": rows.offsets,
        "targets": rows.targets,
        "truncated": np.int64(rows.truncated),
    }
    if rows.segments is not None:
        arrays["segments"] = rows.segments
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
    return rows
