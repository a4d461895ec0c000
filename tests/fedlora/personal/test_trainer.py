"""What a client with a model of its own does in a round, against the same steps written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedlora.adapters import State
from fedlora.client import Worker
from fedlora.cohort import Member
from fedlora.federation import Federation
from fedlora.personal.model import PersonalModel
from fedlora.personal.private_models import PrivateModels
from fedlora.store import ClientStore
from fedlora.training import batch_order
from tests.conftest import Compose

CLIENT = "client-0003"  # a Wide one


def member_of(worker: Worker, client: str = CLIENT) -> Member:
    keys = worker.model.trains(capability=worker.federation.capability(client))
    return worker.member(worker.start_of(client), [client], 1, client, keys=keys)


def batches(worker: Worker, member: Member) -> list[dict[str, Tensor]]:
    settings = worker.federation.config.client
    order = batch_order(member.rows, settings.batch_size, settings.local_epochs, None, member.rng())
    return [worker.federation.task.collate(worker.federation.rows, rows) for rows in order]


def by_hand(worker: Worker, member: Member, keys: list[str], start: State, loss) -> State:
    """AdamW over the member's batches on ``loss(module, batch)``."""
    worker.model.load({**member.state, **start})
    worker.model.own_trainables(keys)
    optimizer = torch.optim.AdamW(worker.model.parameters(keys), lr=member.learning_rate(0, 1), weight_decay=0.0)
    for batch in batches(worker, member):
        optimizer.zero_grad()
        loss(worker.model.module, batch).backward()
        optimizer.step()
    return worker.model.read(member.state)


def cross_entropy(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(logits, batch["target"])


def paths(module: PrivateModels, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the client's own classifier and of the shared adapter."""
    model = module.models[module.current]
    features = model.features(batch["pixel_values"])  # pyright: ignore
    common = features @ module.adapter.down.weight.T @ module.adapter.up.weight.T  # pyright: ignore
    return model.classifier(features), common  # pyright: ignore


@pytest.mark.parametrize("mu", [0.3, 0.8])
def test_a_round_is_two_phases_with_the_losses_of_the_paper(digits: Compose, tmp_path: Path, mu: float) -> None:
    worker = Worker(Federation(digits("pfedlora", f"adapter.mu={mu}")), ClientStore(tmp_path))
    member = member_of(worker)
    trained = worker.trainer.train([member])[0]
    private, shared = worker.model.private, worker.model.shared
    own = [key for key in private if key in member.state]

    def mixed(module: PrivateModels, batch: dict[str, Tensor]) -> Tensor:
        answer, common = paths(module, batch)
        return (1 - mu) * cross_entropy(answer, batch) + mu * cross_entropy(common, batch)

    first = by_hand(worker, member, own, {}, mixed)
    assert all(torch.equal(first[key], member.state[key]) for key in shared)
    second = by_hand(worker, member, list(shared), first, lambda *x: cross_entropy(paths(*x)[1], x[1]))
    assert set(trained.state) == set(second) == set(member.state)
    for key, value in second.items():
        torch.testing.assert_close(trained.state[key], value, atol=1e-6, rtol=1e-5)


def test_each_phase_leaves_the_other_part_as_it_was_to_the_bit(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    member = member_of(worker)
    for phase, moves in zip(worker.model.phases, ("models.", "adapter."), strict=True):
        monkeypatch.setattr(PersonalModel, "phases", (phase,))
        worker.trainer.train([member])
        for key, value in worker.model.read(member.state).items():
            assert torch.equal(value, member.state[key]) != key.startswith(moves), (moves, key)


def test_models_of_other_clients_are_left_alone(worker: Worker) -> None:
    others = [key for key in worker.model.private if key.startswith("models.Narrow.")]
    before = worker.model.read(others)
    trained = worker.trainer.train([member_of(worker)])[0]
    assert others
    assert not set(others) & set(trained.state)
    for key, value in worker.model.read(others).items():
        assert torch.equal(value, before[key])


def test_the_answer_mixes_both_logits_by_mu(worker: Worker) -> None:
    batch = worker.federation.task.collate(worker.federation.rows, range(5))
    worker.model.load(worker.start_of(CLIENT))
    module = worker.model.module
    assert isinstance(module, PrivateModels)
    assert module.current == "Wide"
    module.adapter.mu = 0.3
    own, common = paths(module, batch)
    torch.testing.assert_close(worker.federation.task.logits(module, batch), 0.7 * own + 0.3 * common)  # pyright: ignore


def test_clients_have_the_models_in_turn(worker: Worker) -> None:
    federation = worker.federation
    names = [federation.capability(client).model for client in federation.clients]
    assert names == ["Narrow", "Wide"] * 5


def test_prototypes_pull_features_and_are_the_means_of_each_class(digits: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(digits("fedproto", "adapter.weight=0.7")), ClientStore(tmp_path))
    member = member_of(worker)
    classes = torch.from_numpy(worker.federation.rows.fixed["target"][member.rows])
    known = int(classes[0])
    means, counts = torch.zeros(10, 24), torch.zeros(10)
    means[known], counts[known] = torch.linspace(0, 1, 24), 5.0
    state = {**member.state, "adapter.means": means, "adapter.counts": counts}
    member = Member(**{**vars(member), "state": state})
    trained = worker.trainer.train([member])[0].state

    def pulled(module: PrivateModels, batch: dict[str, Tensor]) -> Tensor:
        outputs = module(batch["pixel_values"])
        there = (batch["target"] == known)[:, None]
        distance = torch.where(there, (outputs.features - means[known]) ** 2, 0.0).mean()
        return cross_entropy(outputs.own, batch) + 0.7 * distance

    own = [key for key in worker.model.private if key in member.state]
    expected = by_hand(worker, member, own, {}, pulled)
    for key in own:
        torch.testing.assert_close(trained[key], expected[key], atol=1e-6, rtol=1e-5)
    batch = worker.federation.task.collate(worker.federation.rows, member.rows)
    with torch.no_grad():
        features = worker.model.module(batch["pixel_values"]).features
    found = dict(zip(*np.unique(classes.numpy(), return_counts=True), strict=True))
    for number in range(10):
        assert trained["adapter.counts"][number] == found.get(number, 0)
        rows = features[classes == number]
        mean = rows.mean(0) if len(rows) else torch.zeros(24)
        torch.testing.assert_close(trained["adapter.means"][number], mean, atol=1e-5, rtol=1e-5)
