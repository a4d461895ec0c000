"""What an evaluation reports, against a direct computation."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fedlora.client import Worker
from fedlora.evaluation import row_statistics, statistics_of_clients
from fedlora.federation import Federation
from fedlora.store import ClientRecord, ClientStore
from simulations.evaluator import Evaluator
from simulations.simulate import start
from strategies.base import FederatedStrategy
from strategies.build import build_strategy
from tests.conftest import Compose
from tests.fedlora.helpers import random_state


def accuracy(worker: Worker, rows: np.ndarray) -> float:
    federation = worker.federation
    statistics = row_statistics(worker.model, federation.task, federation.rows, rows, 3)
    return float((statistics["predicted"] == statistics["target"]).mean())


def test_seen_rows_and_unseen_clients_are_reported_apart(tiny: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny("eval.max_rows=null")), ClientStore(tmp_path))
    evaluator = Evaluator(worker, worker.seeded_frozen)
    state = random_state(worker.model, worker.model.shared)
    found = evaluator.evaluate(None, state, 1)
    index = worker.federation.index
    evaluator.load(state, None)
    expected = {
        "validation": np.concatenate(list(index.validation.values())),
        "seen": np.concatenate([index.test[client] for client in evaluator.panel]),
        "test": np.concatenate(list(index.unseen.values())),
    }
    for name, rows in expected.items():
        assert found.metrics[f"{name}_accuracy"] == pytest.approx(accuracy(worker, rows))
    for of_clients, owners in ((found.clients, evaluator.own_test), (found.unseen_clients, index.unseen)):
        each = np.array([accuracy(worker, rows) for rows in owners.values() if len(rows)])
        assert of_clients is not None
        assert of_clients["mean"] == pytest.approx(each.mean())
        assert of_clients["std"] == pytest.approx(each.std())
        assert of_clients["worst"] == pytest.approx(each.min())
    assert found.clients != found.unseen_clients


@pytest.mark.parametrize(
    "settings",
    [["method=zero_shot"], ["method=fedit", "eval.personalise=true"], ["method=local"], ["method=fedsa"]],
    ids=" ".join,
)
def test_the_statistics_of_the_summary_are_those_of_the_clients_in_the_run_folder(
    tiny: Compose, tmp_path: Path, settings: list[str]
) -> None:
    summary = start(tiny(*settings, "rounds=2"), tmp_path / "run")
    found: Any = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    kinds = {"seen": "clients", "unseen": "unseen_clients", "personalised": "personalised_clients"}
    for kind, key in kinds.items():
        own, expected = found[found["kind"] == kind], summary["final"][key]
        assert own.empty == (expected is None)
        if expected is not None:
            values = own["accuracy"].sort_values()
            assert own["client"].is_unique
            assert expected["mean"] == pytest.approx(values.mean())
            assert expected["std"] == pytest.approx(values.std(ddof=0))
            assert expected["worst"] == values.min()
            assert expected["worst_decile"] == pytest.approx(values[: max(1, round(len(values) / 10))].mean())
    seen = found[found["kind"] == "seen"]
    assert len(seen) == summary["clients"]["evaluated"]
    pooled = (seen["accuracy"] * seen["rows"]).sum() / seen["rows"].sum()
    assert summary["final"]["metrics"]["seen_accuracy"] == pytest.approx(pooled)


def test_clients_with_few_rows_are_in_no_number_of_single_clients(tiny: Compose, tmp_path: Path) -> None:
    start(tiny("method=ffa"), tmp_path / "all")
    whole = pd.read_parquet(tmp_path / "all" / "clients.parquet")
    least = int(whole["rows"].median())
    summary = start(tiny("method=ffa", f"eval.min_rows={least}"), tmp_path / "few")
    found = pd.read_parquet(tmp_path / "few" / "clients.parquet")
    expected = whole[whole["rows"] >= least].reset_index(drop=True)
    assert 0 < len(expected) < len(whole)
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected)
    seen = found[found["kind"] == "seen"]["accuracy"]
    assert summary["final"]["clients"]["mean"] == pytest.approx(seen.mean())
    nobody = start(tiny("method=ffa", "eval.min_rows=1000"), tmp_path / "nobody")
    assert nobody["final"]["clients"] is None


def test_bounded_rows_bound_the_unseen_clients_too(tiny: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny("eval.max_rows=7")), ClientStore(tmp_path))
    evaluator = Evaluator(worker, worker.seeded_frozen)
    assert sum(len(rows) for rows in evaluator.unseen.values()) == len(evaluator.test) == 7


def test_personal_models_have_no_unseen_clients(tiny: Compose, tmp_path: Path) -> None:
    summary = start(tiny("method=local", "rounds=1"), tmp_path / "run")
    assert summary["final"]["unseen_clients"] is None
    assert "test_accuracy" not in summary["final"]["metrics"]
    assert "seen_accuracy" in summary["final"]["metrics"]


@pytest.mark.parametrize("settings", [["method=fedsa"], ["method=fed_sb", "adapter.head=private"]], ids=" ".join)
def test_personal_models_hold_what_is_shared_as_the_server_has_it(
    tiny: Compose, tmp_path: Path, settings: list[str]
) -> None:
    """Its frozen tensors too, also for clients that have not been sent them yet."""
    worker = Worker(Federation(tiny(*settings, "rounds=1")), ClientStore(tmp_path))
    strategy = build_strategy(worker.federation.config.strategy, worker.model)
    assert isinstance(strategy, FederatedStrategy)
    private = random_state(worker.model, worker.model.private, 1)
    for each in worker.federation.clients:
        worker.store.write(each, 1, ClientRecord(private))
    frozen = random_state(worker.model, worker.model.frozen, 2)
    evaluator = Evaluator(worker, frozen)
    state = random_state(worker.model, worker.model.shared)
    found = evaluator.evaluate(strategy, state, 1)
    worker.model.load({**state, **private, **frozen})
    rows = np.concatenate([worker.federation.index.validation[client] for client in evaluator.panel])
    assert found.metrics["validation_accuracy"] == pytest.approx(accuracy(worker, rows))
    losses = row_statistics(worker.model, worker.federation.task, worker.federation.rows, rows, 3)["loss"]
    assert found.metrics["validation_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)


def test_calibration_is_reported_when_asked_for(tiny: Compose, tmp_path: Path) -> None:
    asked = start(tiny("task.calibration=true", "rounds=1"), tmp_path / "asked")["final"]["metrics"]
    assert 0 <= asked["test_ece"] <= 1
    assert "test_ece" not in start(tiny("rounds=1"), tmp_path / "not")["final"]["metrics"]


def test_another_main_metric_chooses_the_best_round(tiny: Compose, tmp_path: Path) -> None:
    summary = start(tiny("task.metric=macro_f1"), tmp_path / "run")
    assert summary["main_metric"] == "macro_f1"
    assert 0 <= summary["best"]["clients"]["mean"] <= 1


def test_samples_show_the_model_before_and_after_training(tiny_lm: Compose, tmp_path: Path) -> None:
    learn = ("rounds=3", "client.local_epochs=6", "client.lr=3e-2", "cohort.size=null", "task.max_new_tokens=5")
    samples = start(tiny_lm("method=fedit", "eval.samples=2", *learn), tmp_path / "run")["samples"]
    assert len(samples) == 2
    for sample in samples:
        assert set(sample) == {"prompt", "reference", "before", "answer"}
        assert "plus" in sample["prompt"]
        assert "of course" in sample["reference"]
        assert sample["answer"] != sample["before"]


@pytest.mark.parametrize("settings", [["method=local"], ["method=ffa", "adapter.head=private"]], ids=" ".join)
@pytest.mark.parametrize("missing", ["test", "validation"])
def test_personal_models_are_evaluated_on_the_rows_there_are(
    tiny: Compose, tmp_path: Path, settings: list[str], missing: str
) -> None:
    summary = start(tiny(*settings, f"data.split.{missing}=0", "rounds=1"), tmp_path / "run")
    metrics, other = summary["final"]["metrics"], {"test": "validation", "validation": "seen"}[missing]
    assert f"{other}_accuracy" in metrics
    assert {"test": "seen", "validation": "validation"}[missing] + "_accuracy" not in metrics
    assert (summary["final"]["clients"] is None) == (missing == "test")


@pytest.mark.parametrize("settings", [["method=local"], ["method=ffa", "adapter.head=private"]], ids=" ".join)
def test_personal_models_in_one_batch_are_those_models_alone(
    tiny: Compose, tmp_path: Path, settings: list[str]
) -> None:
    config = tiny(*settings, "eval.batch_size=9", "cohort.size=null", "client.lr=0.03")
    start(config, tmp_path / "run")
    worker = Worker(Federation(config), ClientStore(tmp_path / "run" / "clients"))
    assert worker.share_steps() is None
    evaluator = Evaluator(worker, worker.seeded_frozen)
    state = random_state(worker.model, worker.model.shared) if "local" not in settings[0] else {}
    shared = evaluator._personal_statistics(state, None, 3)
    worker.trainer.axis = None
    alone = evaluator._personal_statistics(state, None, 3)
    assert shared.keys() == alone.keys() == set(evaluator.panel)
    for client, statistics in alone.items():
        for name, values in statistics.items():
            np.testing.assert_allclose(shared[client][name], values, rtol=1e-4, atol=1e-5)
    assert len({round(float(statistics["loss"].mean()), 6) for statistics in alone.values()}) > 3


@pytest.mark.parametrize("method", ["pfedlora", "local_full"])
def test_clients_are_evaluated_one_at_a_time(
    digits: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The same bits as with every client's tensors in hand, of which no two clients' are held together."""
    config = digits(method, "cohort.size=null", "rounds=1")
    start(config, tmp_path / "run")
    worker = Worker(Federation(config), ClientStore(tmp_path / "run" / "clients"))
    evaluator = Evaluator(worker, worker.seeded_frozen)
    state = random_state(worker.model, worker.model.shared) if method == "pfedlora" else {}
    rows = {c: np.concatenate([worker.federation.index.validation[c], worker.federation.index.test[c]])
            for c in evaluator.panel}  # fmt: skip
    states = {client: {**worker.personal(client, 2)[0], **state} for client in evaluator.panel}
    task, encoded, size = worker.federation.task, worker.federation.rows, config.eval.batch_size
    expected = statistics_of_clients(worker.model, None, task, encoded, states.__getitem__, rows, size)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, read = 0, worker.store.read

    def watched(client: str, server_round: int) -> ClientRecord:
        nonlocal most
        record = read(client, server_round)
        alive.update(record.private.values())
        most = max(most, len(alive))
        return record

    monkeypatch.setattr(worker.store, "read", watched)
    found = evaluator._personal_statistics(state, None, 1)
    assert found.keys() == expected.keys() == set(evaluator.panel)
    for client, statistics in expected.items():
        for name, values in statistics.items():
            np.testing.assert_array_equal(found[client][name], values)
    assert 0 < most < 3 * len(watched(evaluator.panel[0], 2).private)
