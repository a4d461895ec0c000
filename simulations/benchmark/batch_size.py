"""The batch size at which central training is fastest here, measured."""

from __future__ import annotations

import time
from collections.abc import Callable

SIZES = (16, 32, 64, 128)
PROBE_ROWS = 256


def candidates(total_rows: int) -> tuple[int, ...]:
    """Batch sizes that divide the rows of a round, so that each row is trained on once; never empty."""
    return tuple(size for size in SIZES if total_rows % size == 0) or (total_rows,)


def fastest(total_rows: int, train: Callable[[int, int], object]) -> int:
    """The candidate with the fewest seconds a row; ``train(size, steps)`` takes that many steps."""
    sizes = candidates(total_rows)
    cost: dict[int, float] = {}
    for size in (sizes[0], *sizes):  # the first one twice: what is slow only once counts for nobody
        steps = max(1, min(PROBE_ROWS, total_rows) // size)
        started = time.perf_counter()
        train(size, steps)
        cost[size] = (time.perf_counter() - started) / (size * steps)
    return min(cost, key=lambda size: cost[size])
