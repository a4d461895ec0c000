"""The first private training must move everything that is trained and nothing that is frozen, or it is not released."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora import trainer
from fedlora.client import Worker
from fedlora.cohort import Member, Trained
from fedlora.errors import FedloraError
from fedlora.federation import Federation
from fedlora.model import AdaptedModel
from fedlora.privacy.randomness import Seeded
from fedlora.store import ClientStore
from tests.conftest import Compose

METHODS = {
    "fedit": [], "ffa": ["adapter.head=private"], "fed_sb": ["adapter.head=frozen"], "ravan": [], "fedsa": [],
    "orthogonal": [], "o_lora": [], "la_lora": ["client.local_epochs=2"], "local": [],
}  # fmt: skip


def prepared(tiny: Compose, folder: Path, engine: str, *overrides: str) -> Worker:
    worker = Worker(Federation(tiny("privacy=record", "cohort.size=null", *overrides)), ClientStore(folder))
    worker.reset()
    if engine == "cohort":
        assert worker.share_steps() is None
    return worker


def members(worker: Worker, parts: tuple[str, ...] = ()) -> list[Member]:
    keys = worker.model.trains(parts)
    return [worker.member(worker.start_of(c), [c], 1, c, keys=keys) for c in worker.federation.clients[:2]]


@pytest.mark.parametrize("engine", ["loop", "cohort"])
@pytest.mark.parametrize("method", METHODS)
def test_private_training_moves_what_is_trained_and_nothing_else(
    tiny: Compose, tmp_path: Path, engine: str, method: str
) -> None:
    worker = prepared(tiny, tmp_path, engine, f"method={method}", *METHODS[method])
    ours = members(worker)
    for member, trained in zip(ours, worker.trainer.train(ours), strict=True):
        assert set(trained.state) == set(worker.model.trainable)
        assert not any(value.equal(member.state[key]) for key, value in trained.state.items())


@pytest.mark.parametrize("engine", ["loop", "cohort"])
def test_the_factor_that_rests_stays_as_it_was(tiny: Compose, tmp_path: Path, engine: str) -> None:
    worker = prepared(tiny, tmp_path, engine, "method=rolora")
    ours = members(worker, ("lora_B",))
    for member, trained in zip(ours, worker.trainer.train(ours), strict=True):
        rests = {key for key, value in trained.state.items() if value.equal(member.state[key])}
        assert rests == {key for key in trained.state if ".lora_A." in key}


@pytest.mark.parametrize("engine", ["loop", "cohort"])
def test_a_factor_that_had_no_turn_may_stay_and_must(tiny: Compose, tmp_path: Path, engine: str) -> None:
    worker = prepared(tiny, tmp_path, engine, "method=la_lora", "client.local_steps=1")
    ours = members(worker)
    for member, trained in zip(ours, worker.trainer.train(ours), strict=True):
        rests = {key for key, value in trained.state.items() if value.equal(member.state[key])}
        assert rests == {key for key in trained.state if ".lora_A." in key}


@pytest.mark.parametrize("engine", ["loop", "cohort"])
def test_noise_that_is_missing_is_noticed_before_anything_is_released(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    worker = prepared(tiny, tmp_path, engine, "method=fedit", "client.weight_decay=0.0", "client.local_steps=1")
    monkeypatch.setattr(Seeded, "normal", lambda self, shape, std: torch.zeros(tuple(shape)))
    for _ in range(2):  # and as long as it is missing
        with pytest.raises(FedloraError, match=r"'\S+lora_A\.weight' of client 'site 00' is trained, and the noise of"):
            worker.trainer.train(members(worker))


def test_where_there_is_no_noise_a_tensor_may_stay(tiny: Compose, tmp_path: Path) -> None:
    silent = ["privacy.epsilon=null", "privacy.noise_multiplier=0.0", "client.weight_decay=0.0", "client.local_steps=1"]
    worker = prepared(tiny, tmp_path, "cohort", "method=fedit", *silent)
    ours = members(worker)
    trained = worker.trainer.train(ours)[0]
    assert any(value.equal(ours[0].state[key]) for key, value in trained.state.items())


@pytest.mark.parametrize("frozen", ["bert.embeddings.word_embeddings.weight", "lora_A"])
def test_a_frozen_tensor_that_moves_is_named(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    worker = prepared(tiny, tmp_path, "loop", "method=ffa")
    alone: Callable[..., Trained] = trainer.train_alone

    def careless(model: AdaptedModel, *rest: object) -> Trained:
        tensor = next(p for name, p in model.module.named_parameters() if frozen in name)
        tensor.data.view(-1)[-1] += 1e-6
        return alone(model, *rest)

    monkeypatch.setattr(trainer, "train_alone", careless)
    with pytest.raises(FedloraError, match=rf"{frozen}\S*' is frozen, and private training of adapter=ffa has changed"):
        worker.trainer.train(members(worker))


def test_a_resting_factor_that_moves_is_named(tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = prepared(tiny, tmp_path, "loop", "method=rolora")
    alone: Callable[..., Trained] = trainer.train_alone

    def careless(*given: object) -> Trained:
        trained = alone(*given)
        return replace(trained, state={key: value + 1e-3 for key, value in trained.state.items()})

    monkeypatch.setattr(trainer, "train_alone", careless)
    with pytest.raises(FedloraError, match=r"lora_A\.weight' of client 'site 00' rests in this round"):
        worker.trainer.train(members(worker, ("lora_B",)))
