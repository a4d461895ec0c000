"""Penalised LoRA: the penalty is that of its formula, untouched by clipping, the same on every engine, and it works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedlora.adapters import State
from fedlora.client import Worker
from fedlora.cohort import train_alone, train_cohort
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.model import AdaptedModel
from fedlora.store import ClientStore
from simulations.simulate import start
from strategies.build import build_strategy
from tests.conftest import Compose
from tests.fedlora.helpers import random_state
from tests.simulations.test_cohort import assert_engines_agree

METHOD = ["method=o_lora", "adapter.groups=3"]


def penalty(model: AdaptedModel, state: State, client: str, weight: float) -> Tensor:
    """lambda sum_{j != own} ||A Q_j^T||_F^2 over all layers, from the definition."""
    clients = model.adapter.clients
    own = clients.index(client) % 3
    others = [model.own_of(clients[group]) for group in range(3) if group != own]
    terms = [(state[key] @ rows.T).square().sum() for other in others for key, rows in other.items()]
    return weight * torch.stack(terms).sum()


def test_the_gradient_is_that_of_the_penalty_for_each_client(tiny: Compose) -> None:
    model = Federation(tiny(*METHOD, "adapter.penalty=0.7", "adapter.rank=5")).build_model()
    clients = model.adapter.clients[1:6]
    states = [random_state(model, model.trainable, seed) for seed in range(len(clients))]
    stacked = {key: torch.stack([state[key] for state in states]) for key in model.trainable}
    found = model.penalty_gradient(stacked, clients)
    assert set(found) == {f"{name}.lora_A.weight" for name in model.layers}
    for place, (client, state) in enumerate(zip(clients, states, strict=True)):
        leaves = {key: state[key].requires_grad_() for key in found}
        penalty(model, leaves, client, 0.7).backward()
        for key, leaf in leaves.items():
            torch.testing.assert_close(found[key][place], leaf.grad, atol=1e-6, rtol=1e-5)


def test_a_client_starts_where_the_penalty_is_zero(tiny: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny(*METHOD)), ClientStore(tmp_path))
    for client in worker.federation.clients:
        state = worker.start_of(client)
        assert penalty(worker.model, state, client, 1.0) <= 1e-10
        gradients = worker.model.penalty_gradient({key: value[None] for key, value in state.items()}, [client])
        assert all(value.abs().max() <= 1e-6 for value in gradients.values())


@pytest.mark.parametrize("engine", ["alone", "cohort"])
def test_clipping_leaves_the_penalty_as_it_is(tiny: Compose, tmp_path: Path, engine: str) -> None:
    settings = ["client.optimizer=sgd", "client.lr=0.1", "client.max_grad_norm=1e-9", "client.local_steps=1"]
    worker = Worker(Federation(tiny(*METHOD, *settings, "adapter.penalty=0.5")), ClientStore(tmp_path))
    federation, model, clients = worker.federation, worker.model, worker.federation.clients[:4]
    states = [{**worker.initial, **random_state(model, model.trainable, place)} for place in range(4)]
    members = [worker.member(state, [c], 1, c) for state, c in zip(states, clients, strict=True)]
    common = federation.task, federation.rows, federation.config.client
    if engine == "alone":
        trained = [train_alone(model, *common, member) for member in members]
    else:
        assert worker.share_steps() is None
        assert worker.trainer.axis is not None
        trained = train_cohort(model, worker.trainer.axis, *common, members)
    for client, before, after in zip(clients, states, trained, strict=True):
        expected = model.penalty_gradient({key: before[key][None] for key in model.trainable}, [client])
        for key in model.trainable:
            step = 0.1 * expected[key][0] if key in expected else torch.zeros_like(before[key])
            torch.testing.assert_close(before[key] - after.state[key], step, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_cohort_equals_loop_with_a_penalty_that_matters(tiny: Compose, tmp_path: Path, optimizer: str) -> None:
    more = [f"client.optimizer={optimizer}", "client.max_grad_norm=0.5", "adapter.penalty=2", "cohort.size=null"]
    assert_engines_agree(tiny, tmp_path, *METHOD, *more)


def overlap(run: Path) -> float:
    """How much of the rows of each group's A lies in those of another's."""
    blocks = load_file(run / "adapter" / "blocks.safetensors")
    rows: dict[str, dict[str, Tensor]] = {}
    for name, value in blocks.items():
        if name.endswith(".lora_A.weight"):
            group, _, key = name.rpartition("/")
            rows.setdefault(key, {})[group] = value
    pairs = [(own[a], own[b]) for own in rows.values() for a in own for b in own if a < b]
    return sum(float((a @ b.T).square().sum()) for a, b in pairs)


def test_the_penalty_keeps_the_rows_of_groups_apart(tiny: Compose, tmp_path: Path) -> None:
    settings = [*METHOD, "adapter.rank=10", "client.optimizer=sgd", "client.lr=1", "cohort.size=null"]
    for weight in ("0", "0.25"):
        summary = start(tiny(*settings, f"adapter.penalty={weight}"), tmp_path / weight)
        assert summary["aggregation_error"]["max"] > 1e-6
        assert summary["label"] == "o_lora[groups=3]"
    assert overlap(tmp_path / "0.25") < 0.5 * overlap(tmp_path / "0")


def test_where_every_client_has_rows_of_its_own_the_sum_is_exact(tiny: Compose, tmp_path: Path) -> None:
    summary = start(tiny("method=o_lora", "adapter.groups=null", "adapter.rank=3"), tmp_path / "run")
    assert 0 < summary["aggregation_error"]["max"] <= 1e-6


def test_a_client_alone_trains_from_its_own_rows(tiny: Compose, tmp_path: Path) -> None:
    start(tiny(*METHOD, "strategy=local", "rounds=1"), tmp_path / "run")
    store = ClientStore(tmp_path / "run" / "clients")
    private = store.read(next(iter(store.clients())), 2).private
    assert all(value.any() for key, value in private.items() if ".lora_" in key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*METHOD, "strategy=fedit"], r"o_lora\[groups=3\].*mix numbers.*strategy=o_lora"),
        ([*METHOD, "strategy=central"], r"mix numbers"),
        ([*METHOD, "strategy=disjoint"], r"strategy=disjoint is exact where only B is trained.*strategy=o_lora"),
        (["method=disjoint", "strategy=o_lora"], r"orthogonal\[disjoint\] has none. Use adapter=o_lora"),
        ([*METHOD, "+adapter.subspace=shared"], r"adapter.subspace"),
        ([*METHOD, "adapter.penalty=-1"], r"adapter.penalty"),
        (["method=o_lora", "adapter.groups=9"], r"o_lora\[groups=9\] gives each of 9 groups adapter.rank = 4 rows"),
    ],
)
def test_what_cannot_work_is_refused(tiny: Compose, overrides: list[str], message: str) -> None:
    def build() -> None:
        config = tiny(*overrides)
        build_strategy(config.strategy, Federation(config).build_meta_model())

    with pytest.raises(InputError, match=message):
        build()
