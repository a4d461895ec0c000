"""A client that is not asked costs nothing but its entry in the index, however many there are."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from flwr.app import Message

from fedlora import wire
from fedlora.client import worker_for
from simulations.callbacks import Callback
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder
from strategies.build import build_strategy
from tests.conftest import Compose
from tests.fedlora.helpers import Engine, random_state, reply

COHORT = 12


class PeakOfRounds(Callback):
    """Python's memory above that at the end of the round before: the most during a round, and what is left of it."""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self.left: list[int] = []
        self._before = 0

    def on_round_end(self, record: Mapping[str, Any]) -> None:
        """Called for the start too, as round 0."""
        gc.collect()  # or a round is charged for cycles of the rounds before
        now, peak = tracemalloc.get_traced_memory()
        self.peaks.append(peak - self._before)
        self.left.append(now - self._before)
        tracemalloc.reset_peak()
        self._before = now


def rounds_with(population: int, tiny: Compose, tmp_path: Path, *overrides: str) -> PeakOfRounds:
    """Four rounds of twelve clients of the whole stack, on an engine that answers at once."""
    names = [f"client {number:06d}" for number in range(population)]
    rows = pd.DataFrame({"text": "a film", "label": ["good", "bad"] * (population // 2), "site": names})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    config = tiny(
        f"data.path={tmp_path / 'rows.csv'}", "partition.min_rows=1", f"cohort.size={COHORT}", "rounds=4",
        "eval.every=4", "eval.max_rows=8", "eval.max_clients=4", *overrides,
    )  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    worker_for.cache_clear()
    worker = worker_for(config.model_dump_json(), str(folder.path))

    def answer(message: Message) -> Message:
        state = random_state(worker.model, worker.model.shared, message.metadata.dst_node_id % 1000)
        return reply(message, wire.pack(state))

    measured = PeakOfRounds()
    run = FederatedRun(worker, build_strategy(config.strategy, worker.model), folder, [measured])
    engine = Engine(answer)
    engine.answers = engine.requests = _Forgotten()
    run.worker.federation.rows  # noqa: B018  read before the measurement, as every evaluation does
    tracemalloc.start()
    try:
        run.run(engine)
    finally:
        tracemalloc.stop()
    assert len(run.federation.clients) > 0.7 * population
    return measured


class _Forgotten(list):
    def __iadd__(self, other: object) -> _Forgotten:
        return self


@pytest.mark.parametrize("overrides", [["method=fedex"], ["method=fed_sb"]], ids=" ".join)
def test_a_round_of_twelve_needs_no_more_memory_with_a_hundred_thousand_clients(
    tiny: Compose, tmp_path: Path, overrides: list[str]
) -> None:
    few, many = (tmp_path / name for name in ("few", "many"))
    few.mkdir()
    many.mkdir()
    small, large = rounds_with(200, tiny, few, *overrides), rounds_with(100_000, tiny, many, *overrides)
    for before, after in zip(small.peaks[2:4], large.peaks[2:4], strict=True):  # rounds without an evaluation
        assert after < before + 50_000  # half a byte a client
    for before, after in zip(small.left[2:4], large.left[2:4], strict=True):
        assert after < before + 50_000
