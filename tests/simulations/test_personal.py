"""Whole runs of methods whose clients have models of their own: bytes, plan, what stays, resume, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlora.client import Worker
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.store import ClientStore
from simulations.compose import choices_of, options
from simulations.plan import plan_run
from simulations.simulate import resume, start
from tests.conftest import Compose
from tests.simulations.test_resume import KillAt, Killed, assert_same_run
from tests.simulations.test_rounds import rounds_of, without_time

METHODS = [method for method in options("method") if "backbone" in choices_of(method)]
ONE = {"fedavg": ["backbone.models=[NETS:Narrow]"]}
ADAPTER = 4 * (24 + 10)
"""Numbers of the shared adapter: rank 4, 24 features, 10 classes, no biases."""


@pytest.fixture
def composed(digits: Compose, networks: Path) -> Compose:
    """Any of the methods on the clients of ``digits``; FedAvg with one model for all."""

    def compose(method: str, *overrides: str):
        own = [each.replace("NETS", str(networks)) for each in ONE.get(method, [])]
        return digits(method, *own, *overrides)

    return compose


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_sends_what_its_plan_says(composed: Compose, tmp_path: Path, method: str) -> None:
    config = composed(method, "client.local_epochs=3")
    planned, summary = plan_run(config), start(config, tmp_path / "run")
    records = rounds_of(tmp_path / "run")
    assert records[-1]["metrics"]["validation_loss"] < records[0]["metrics"]["validation_loss"]
    assert set(records[-1]["clients"]) >= {"mean", "worst_decile", "worst"}
    for expected, record in zip(planned["per_round"], records[1:], strict=True):
        for key in ("payload_up", "payload_down", "setup_bytes"):
            assert record[key] == expected[key], key
        for key in ("message_up", "message_down", "transport_up", "transport_down"):
            assert record[key] == pytest.approx(expected[key], rel=1e-3), key
    error = summary["aggregation_error"]
    assert (error is None) == (method not in ("pfedlora", "fedavg"))
    if method == "pfedlora":
        assert 1e-4 < error["max"] < 1  # a mean of factors is not the mean of their products
    if method == "fedavg":
        assert error["max"] <= 1e-6


def test_only_the_adapter_travels(composed: Compose, tmp_path: Path) -> None:
    summary = start(composed("pfedlora"), tmp_path / "run")
    assert summary["per_round"]["payload_up"] == summary["per_round"]["payload_down"] == 4 * ADAPTER * 4
    assert summary["totals"]["setup_bytes"] == 0
    shared = load_file(tmp_path / "run" / "shared.safetensors")
    assert sum(value.numel() for value in shared.values()) == ADAPTER
    assert not (tmp_path / "run" / "adapter").exists()
    assert "one after the other: every client has a model of its own" in (tmp_path / "run" / "log.txt").read_text()


def test_an_adapter_of_rank_20_beside_the_five_networks_has_10200_numbers(composed: Compose) -> None:
    plan = plan_run(
        composed("pfedlora", "backbone.models=[cnn_1,cnn_2,cnn_3,cnn_4,cnn_5]", "task.image_size=16", "adapter.rank=20")
    )
    assert plan["upload_params"] == plan["download_params"] == 10_200
    assert plan["client_flops_per_round"] > 0


def test_the_work_of_a_client_is_counted_in_both_phases(composed: Compose, networks: Path) -> None:
    settings = [f"backbone.models=[{networks}:Narrow]", "client.local_epochs=2"]
    federation = Federation(composed("local_full", *settings))
    rows = sum(map(len, federation.index.train.values())) / len(federation.clients)
    layers = 64 * 16 + 16 * 24 + 24 * 10
    forward = 2 * layers
    inputs = 2 * (layers - 64 * 16)  # nobody needs the gradient of the pictures
    alone = forward + forward + inputs
    assert plan_run(federation.config)["client_flops_per_round"] == pytest.approx(2 * rows * alone)
    theta = 2 * ADAPTER
    phases = (alone + 2 * theta) + (forward + 2 * theta + 2 * 4 * 10)
    assert plan_run(composed("pfedlora", *settings))["client_flops_per_round"] == pytest.approx(2 * rows * phases)


def test_private_models_go_on_where_they_were_and_stay_at_their_clients(composed: Compose, tmp_path: Path) -> None:
    config = composed("pfedlora", "cohort.size=null", "rounds=2", "checkpoint.every=0")
    start(config, tmp_path / "run")
    worker = Worker(Federation(config), ClientStore(tmp_path / "run" / "clients"))
    for position, client in enumerate(worker.federation.clients):
        first, second = (load_file(path) for path in sorted((tmp_path / "run" / "clients" / client).glob("*")))
        own = f"models.{('Narrow', 'Wide')[position % 2]}."
        assert first.keys() == second.keys() == {key for key in worker.model.private if key.startswith(own)}
        state, _ = worker.personal(client, 2)
        assert all(torch.equal(state[key], value) for key, value in first.items())
        assert all(not torch.equal(second[key], value) for key, value in first.items())


@pytest.mark.parametrize(
    ("method", "kill"),
    [
        ("pfedlora", {"client": 6}),
        ("pfedlora", {"round_end": 2}),
        ("fedproto", {"client": 9}),
        ("local_full", {"client": 6}),
    ],
    ids=str,
)
def test_a_killed_run_resumes_to_the_same_bits(
    composed: Compose, tmp_path: Path, method: str, kill: dict[str, int]
) -> None:
    config = composed(method, "client.keep_optimizer=true")
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(**kill)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    if (tmp_path / "whole" / "shared.safetensors").exists():
        one, two = (load_file(tmp_path / name / "shared.safetensors") for name in ("whole", "killed"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_cohort_engine_gives_the_numbers_of_the_loop(composed: Compose, tmp_path: Path) -> None:
    for engine in ("loop", "cohort"):
        start(composed("pfedlora", f"engine={engine}"), tmp_path / engine)
    assert without_time(tmp_path / "loop") == without_time(tmp_path / "cohort")


def test_a_transformer_and_a_perceptron_learn_together(composed: Compose, tmp_path: Path, networks: Path) -> None:
    models = f"backbone.models=[{networks}:Narrow,{networks.parent}/pooled_vit.py:PooledViT]"
    config = composed("pfedlora", models, "cohort.size=null", "rounds=2", "client.local_epochs=2")
    start(config, tmp_path / "run")
    first, *_, last = rounds_of(tmp_path / "run")
    assert last["metrics"]["validation_loss"] < first["metrics"]["validation_loss"]
    worker = Worker(Federation(config), ClientStore(tmp_path / "run" / "clients"))
    for client in worker.federation.clients[:2]:
        state, _ = worker.personal(client, 3)
        start_of = worker.start_of(client)
        assert all(not torch.equal(state[key], start_of[key]) for key in state if key in worker.model.private)


def test_a_model_that_cannot_work_leaves_no_folder(composed: Compose, tmp_path: Path, networks: Path) -> None:
    with pytest.raises(InputError, match="a last layer of 24 outputs"):
        start(composed("pfedlora", f"backbone.models=[{networks}:Narrow,{networks}:Thin]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="has nothing to merge"):
        start(composed("fedavg", "rounds=1"), tmp_path / "merged", merged=True)
