"""Whole runs whose clients have transformers encoders of their own: learning, bytes, plan, resume, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlora.client import Worker
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.store import ClientStore
from simulations.plan import plan_run
from simulations.simulate import resume, start
from tests.conftest import Compose
from tests.simulations.test_resume import KillAt, Killed, assert_same_run
from tests.simulations.test_rounds import rounds_of

ADAPTER = 4 * (24 + 2)
"""Numbers of the shared adapter: rank 4, 24 features, 2 classes, no biases."""
SENT = {"pfedlora": ADAPTER, "fedproto": 2 * 24 + 2, "local_full": 0}


@pytest.mark.parametrize("method", SENT)
def test_two_encoders_learn_together_and_send_what_the_plan_says(letters: Compose, tmp_path: Path, method: str) -> None:
    config = letters(method, "client.local_epochs=2", "client.lr=3e-3", "cohort.size=6")
    planned, summary = plan_run(config), start(config, tmp_path / "run")
    first, *_, last = records = rounds_of(tmp_path / "run")
    assert last["metrics"]["validation_loss"] < first["metrics"]["validation_loss"]
    for expected, record in zip(planned["per_round"], records[1:], strict=True):
        for key in ("payload_up", "payload_down", "setup_bytes"):
            assert record[key] == expected[key], key
    assert summary["per_round"]["payload_up"] == 6 * 4 * SENT[method]
    assert planned["upload_params"] == SENT[method]
    assert planned["client_flops_per_round"] > 0


def test_each_client_keeps_its_own_encoder(
    letters: Compose, tmp_path: Path, tiny_bert: Path, tiny_roberta: Path
) -> None:
    config = letters("pfedlora", "cohort.size=null", "checkpoint.every=0")
    start(config, tmp_path / "run")
    worker = Worker(Federation(config), ClientStore(tmp_path / "run" / "clients"))
    for position, client in enumerate(worker.federation.clients[:4]):
        own = f"models.{(tiny_bert, tiny_roberta)[position % 2].name}."
        state, _ = worker.personal(client, 3)
        kept = {key for path in (tmp_path / "run" / "clients" / client).glob("*") for key in load_file(path)}
        assert kept == {key for key in worker.model.private if key.startswith(own)}
        start_of = worker.start_of(client)
        moved = {key for key in kept if not torch.equal(state[key], start_of[key])}
        assert f"{own}encoder.embeddings.word_embeddings.weight" in moved
    assert sum(value.numel() for value in load_file(tmp_path / "run" / "shared.safetensors").values()) == ADAPTER


@pytest.mark.parametrize(("method", "kill"), [("pfedlora", {"client": 6}), ("fedproto", {"round_end": 1})], ids=str)
def test_a_killed_run_resumes_to_the_same_bits(
    letters: Compose, tmp_path: Path, method: str, kill: dict[str, int]
) -> None:
    config = letters(method)
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(**kill)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    one, two = (load_file(tmp_path / name / "shared.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_encoder_and_a_class_of_the_users_own_learn_together(
    letters: Compose, tmp_path: Path, tiny_bert: Path, networks: Path
) -> None:
    models = f"backbone.models=[{networks}:BagOfWords,hf:{tiny_bert}]"
    config = letters("pfedlora", models, "backbone.width=24", "cohort.size=6", "client.local_epochs=2")
    start(config, tmp_path / "run")
    first, *_, last = rounds_of(tmp_path / "run")
    assert last["metrics"]["validation_loss"] < first["metrics"]["validation_loss"]


def test_one_encoder_of_all_clients_travels_whole_and_skips_padding(
    letters: Compose, tmp_path: Path, tiny_bert: Path
) -> None:
    finals = []
    for packing in ("true", "false"):
        config = letters("fedavg", f"backbone.models=[hf:{tiny_bert}]", f"engine.packing={packing}")
        summary = start(config, tmp_path / packing)
        finals.append(rounds_of(tmp_path / packing)[-1]["metrics"]["validation_loss"])
    assert finals[0] == pytest.approx(finals[1], abs=1e-4)
    assert summary["aggregation_error"]["max"] <= 1e-6


def test_an_encoder_that_cannot_work_leaves_no_folder(letters: Compose, tmp_path: Path, tiny_gpt2: Path) -> None:
    with pytest.raises(InputError, match="no encoder of texts"):
        start(letters("pfedlora", f"backbone.models=[hf:{tiny_gpt2}]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
