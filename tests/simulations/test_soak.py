"""A long run in which clients drop out, crash, are late and lie: no honest update is lost, and memory stays flat."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from flwr.app import Array, ArrayRecord, Message

from fedlora import wire
from fedlora.client import Worker, client_app
from fedlora.config import Config
from fedlora.federation import Federation
from fedlora.seeding import numpy_rng
from simulations.callbacks import Callback
from simulations.engines.loop import LoopGrid
from simulations.faults import fate_of
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder
from strategies import FederatedStrategy, weighted_mean
from tests.conftest import Compose, review_rows

MEGABYTE = 1 << 20
FAULTS = ["faults=random", "faults.dropout=0.1", "faults.crash=0.05", "faults.delay=2", "cohort.deadline=5"]
LIARS = 0.05


def lies(server_round: int, client: str) -> bool:
    return bool(numpy_rng(0, "lies", server_round, client).random() < LIARS)


class Liars(LoopGrid):
    """Clients some of whose replies have a broken byte in the last number, so that it is none."""

    def _handle(self, request: Message) -> Message:
        reply = super()._handle(request)
        if lies(self.server_round, self.client_of(request.metadata.dst_node_id)):
            old = reply.content.array_records["arrays"][wire.PACKED]
            data = old.data[:-4] + b"\x00\x00\xc0\x7f"  # not a number
            record = ArrayRecord({wire.PACKED: Array(dtype=old.dtype, shape=old.shape, stype=old.stype, data=data)})
            reply.content["arrays"] = record
        return reply


class Counted(FederatedStrategy):
    """The mean, and the weight of everybody in it by round."""

    def fold(self, server_round: int, state: Any, replies: Any) -> Any:
        self.weights[server_round] = {reply.client: reply.weight for reply in replies}
        return weighted_mean(replies)

    weights: dict[int, dict[str, float]]


class Memory(Callback):
    """Resident memory after every 50th round, in bytes."""

    def __init__(self) -> None:
        self.resident: dict[int, int] = {}

    def on_round_end(self, record: Mapping[str, Any]) -> None:
        if record["round"] % 50 == 0:
            gc.collect()
            self.resident[record["round"]] = psutil.Process().memory_info().rss


def soak(config: Config, folder: Path) -> tuple[Counted, Memory]:
    run_folder, strategy, memory = RunFolder(folder), Counted(), Memory()
    config = config.model_copy(update={"run_dir": str(folder)})
    worker = Worker(Federation(config), run_folder.store)
    worker.share_steps()
    run_folder.create(config)
    strategy.weights = {}
    run = FederatedRun(worker, strategy, run_folder, [memory])
    run.run(Liars(client_app(lambda: worker)))
    run.ledger.write(run_folder.ledger_file)
    return strategy, memory


def honest(config: Config, server_round: int, client: str) -> bool:
    """Whether a client answers in time, and the truth."""
    fate = fate_of(config.faults, config.seed, server_round, client)
    late = config.cohort.deadline is not None and fate.delay > config.cohort.deadline
    return not (fate.dropped or fate.crashed or late or lies(server_round, client))


@pytest.fixture
def long(tiny: Compose, tmp_path: Path) -> Callable[..., Config]:
    """Composes a long run of 50 clients."""
    review_rows(400, clients=50).to_csv(tmp_path / "reviews.csv", index=False)

    def compose(rounds: int) -> Config:
        return tiny(
            *FAULTS, f"rounds={rounds}", "cohort.size=40", "cohort.spares=10", "cohort.min_replies=5",
            f"data.path={tmp_path / 'reviews.csv'}", "data.split.unseen_clients=0", "data.split.public_rows=0",
            "client.local_steps=1", "eval.every=100", "eval.max_clients=4", "checkpoint.every=20",
        )  # fmt: skip

    return compose


def check(config: Config, folder: Path, strategy: Counted) -> dict[str, int]:
    """Every honest reply counts, as far as ``cohort.size`` goes, and no other; returns how many messages there were."""
    ledger = pd.read_parquet(folder / "ledger.parquet")
    up = ledger[ledger.direction == "up"]
    for server_round, rows in up.groupby("round"):
        usable = [client for client in rows.client if honest(config, int(str(server_round)), client)]
        weights = strategy.weights[int(str(server_round))]
        assert list(weights) == usable[: config.cohort.size]
        assert all(weight > 0 for weight in weights.values())
        assert sum(weights.values()) == pytest.approx(1.0)
        assert list(rows.client[rows.status == "ok"]) == list(weights)
    reasons = up.status.str.split(":").str[0].str.split("(").str[0].value_counts()
    return {str(reason): int(count) for reason, count in reasons.items()}


def test_no_honest_update_is_lost(long: Callable[..., Config], tmp_path: Path) -> None:
    config = long(4)
    strategy, _ = soak(config, tmp_path / "run")
    assert set(check(config, tmp_path / "run", strategy)) >= {"ok", "late", "refused reply"}


@pytest.mark.slow
def test_200_rounds_of_50_clients_lose_no_honest_update_and_no_memory(
    long: Callable[..., Config], tmp_path: Path
) -> None:
    config = long(200)
    strategy, memory = soak(config, tmp_path / "run")
    counts = check(config, tmp_path / "run", strategy)
    growth = (memory.resident[200] - memory.resident[50]) / MEGABYTE
    print({"replies": counts, "MB after round 50": memory.resident[50] / MEGABYTE, "MB more after round 200": growth})
    assert sum(counts.values()) == 200 * 50
    assert len(strategy.weights) == 200
    assert growth < 16
