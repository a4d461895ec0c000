"""``eval.personalise``: what each client would have after a round of its own, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.client import Worker
from fedlora.cohort import train_alone
from fedlora.evaluation import client_metrics, each_client, row_statistics
from fedlora.federation import Federation
from fedlora.store import ClientStore
from fedlora.trainer import Frozen
from simulations.personalise import personalised
from simulations.simulate import start
from tests.conftest import Compose
from tests.simulations.test_rounds import rounds_of

TUNE = ["client.lr=2e-2", "client.local_epochs=4"]


@pytest.mark.parametrize("method", ["fedex", "fed_sb", "flexlora"])
def test_a_run_is_the_same_with_and_without_it(tiny: Compose, tmp_path: Path, method: str) -> None:
    ranks = ["adapter.client_ranks=[4,2]"] if method == "flexlora" else []
    for flag in ("false", "true"):
        start(tiny(f"method={method}", *TUNE, *ranks, f"eval.personalise={flag}"), tmp_path / flag)
    for plain, tuned in zip(rounds_of(tmp_path / "false"), rounds_of(tmp_path / "true"), strict=True):
        for key in ("loss", "metrics", "clients", "payload_up", "aggregation_error"):
            assert plain[key] == tuned[key], key
        assert plain["personalised_clients"] is None
        if tuned["metrics"]:
            assert set(tuned["personalised_clients"]) == {"mean", "std", "worst_decile", "worst"}


@pytest.mark.parametrize("engine", ["loop", "cohort"])
def test_it_is_the_global_model_trained_at_each_client_alone(tiny: Compose, tmp_path: Path, engine: str) -> None:
    tokens = ["engine.tokens=200"] if engine == "cohort" else []
    federation = Federation(tiny("method=ffa", *TUNE, f"engine={engine}", *tokens))
    worker = Worker(federation, ClientStore(tmp_path))
    if engine == "cohort":
        assert worker.share_steps() is None
    state = worker.model.read(worker.model.shared)
    rows = {client: federation.index.test[client] for client in federation.clients}
    found = personalised(worker, rows, state, Frozen((None, None), {}, {}), 1)
    for client, own in rows.items():
        member = worker.member({**worker.initial, **state}, [client], 2, f"personalise {client}")
        trained = train_alone(worker.model, federation.task, federation.rows, federation.config.client, member)
        worker.model.load(trained.state)
        expected = row_statistics(worker.model, federation.task, federation.rows, own, 32)
        for name, values in expected.items():
            assert found[client][name] == pytest.approx(values, abs=1e-3), (client, name)


def test_own_rows_help_where_labels_are_skewed(tiny: Compose, tmp_path: Path) -> None:
    federation = Federation(tiny("method=ffa", "client.lr=3e-2", "client.local_epochs=8"))
    worker = Worker(federation, ClientStore(tmp_path))
    rows = {client: federation.index.train[client] for client in federation.clients}
    state = worker.model.read(worker.model.shared)
    before = {c: row_statistics(worker.model, federation.task, federation.rows, own, 32) for c, own in rows.items()}
    after = personalised(worker, rows, state, Frozen((None, None), {}, {}), 0)
    task = federation.task
    mean_before, mean_after = (client_metrics(task, each_client(task, found))["mean"] for found in (before, after))
    assert mean_after > mean_before + 0.1
