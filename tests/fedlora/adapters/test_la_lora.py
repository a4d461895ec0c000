"""B and A in turn within a round: what rests in a step is as if the step had not been."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.adapters import State
from fedlora.config import Config
from fedlora.federation import Federation
from fedlora.model import part_of
from fedlora.schedule import learning_rate
from fedlora.training import batch_order, train_steps
from simulations.simulate import start
from tests.conftest import Compose
from tests.fedlora.helpers import random_state
from tests.simulations.test_cohort import assert_engines_agree

METHOD = ["method=la_lora", "client.keep_optimizer=true", "client.local_steps=5", "client.batch_size=3"]


def by_hand(config: Config, state: State) -> tuple[State, dict[str, torch.optim.AdamW]]:
    """Every tensor with an optimiser of its own, which sees only the steps in which the tensor has its turn."""
    federation = Federation(config)
    model, settings, task = federation.build_model(), config.client, federation.task
    model.load(state)
    model.own_trainables()
    parameters = dict(zip(model.trainable, model.parameters(), strict=True))
    optimizers = {
        key: torch.optim.AdamW([parameter], lr=settings.lr, weight_decay=settings.weight_decay)
        for key, parameter in parameters.items()
    }
    rows = federation.index.train[federation.clients[0]]
    for step, batch in enumerate(batch_order(rows, 3, 1, settings.local_steps, np.random.default_rng(0))):
        loss = task.loss(model.module, task.collate(federation.rows, batch))
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        for key in parameters:
            if key in model.head or part_of(key) == ("lora_B", "lora_A")[step % 2]:
                parameters[key].grad = gradients[key]
                optimizers[key].step()
    return model.read(model.trainable), optimizers


def test_a_round_is_that_of_optimisers_in_turn_and_their_moments_are_their_own(tiny: Compose) -> None:
    config = tiny(*METHOD, "client.weight_decay=0.1", "client.lr=0.01")
    federation = Federation(config)
    model = federation.build_model()
    state = random_state(model, model.trainable)
    model.load(state)
    rows = federation.index.train[federation.clients[0]]
    _, moments = train_steps(
        model, federation.task, federation.rows, rows, config.client, np.random.default_rng(0),
        partial(learning_rate, config.client, 1, 1), 0, {}, model.trainable, federation.task.loss,
    )  # fmt: skip
    found = model.read(model.trainable)
    expected, optimizers = by_hand(config, state)
    for key, optimizer in optimizers.items():
        assert not found[key].equal(state[key])
        assert (found[key] - expected[key]).abs().max() <= 1e-6
        kept = optimizer.state[optimizer.param_groups[0]["params"][0]]
        assert int(moments[f"{key}/step"]) == {"lora_B": 3, "lora_A": 2}.get(part_of(key), 5)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(moments[f"{key}/{name}"], kept[name])


@pytest.mark.parametrize(
    "more",
    [
        ["client.weight_decay=0.1", "client.max_grad_norm=0.05"],
        ["client.local_steps=1"],  # A never has its turn
        ["client.optimizer=sgd", "client.keep_optimizer=false", "client.weight_decay=0.1"],
        ["privacy=record", "privacy.clip=0.5"],
    ],
    ids=" ".join,
)
def test_cohort_equals_loop(tiny: Compose, tmp_path: Path, more: list[str]) -> None:
    assert_engines_agree(tiny, tmp_path, *METHOD, "cohort.size=null", *more)


def test_every_step_is_one_release_of_the_account(tiny: Compose, tmp_path: Path) -> None:
    private = ["cohort.size=null", "privacy=record", "privacy.noise_multiplier=1.0", "privacy.epsilon=null"]
    spent = {}
    for method in ("la_lora", "fedit"):
        summary = start(tiny(f"method={method}", *METHOD[2:], *private), tmp_path / method)
        spent[method] = summary["privacy"]["epsilon"]
    assert spent["la_lora"] == spent["fedit"] > 0
