from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedlora.adapters import State
from fedlora.config import ClientConfig, Config
from fedlora.errors import FedloraError
from fedlora.federation import Federation
from fedlora.schedule import learning_rate
from fedlora.training import batch_order, steps_for, train_steps, training_mode
from tests.fedlora.helpers import assert_same, random_state

# The order of batches ---------------------------------------------------------------------------------------------

ROW_COUNTS, BATCHES = st.integers(1, 40), st.integers(1, 12)


@given(ROW_COUNTS, BATCHES, st.integers(1, 4), st.integers(0, 99))
def test_every_epoch_covers_every_row_exactly_once(count, batch_size, epochs, seed):
    rows = np.arange(100, 100 + count)
    batches = list(batch_order(rows, batch_size, epochs, None, np.random.default_rng(seed)))
    per_epoch = math.ceil(count / batch_size)
    assert len(batches) == epochs * per_epoch == steps_for(count, batch_size, epochs, None)
    for epoch in range(epochs):
        seen = np.concatenate(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        np.testing.assert_array_equal(np.sort(seen), rows)
    assert all(1 <= len(batch) <= batch_size for batch in batches)


@given(ROW_COUNTS, BATCHES, st.integers(1, 50))
def test_local_steps_replace_local_epochs(count, batch_size, steps):
    batches = list(batch_order(np.arange(count), batch_size, 3, steps, np.random.default_rng(0)))
    assert len(batches) == steps == steps_for(count, batch_size, 3, steps)
    longer = list(batch_order(np.arange(count), batch_size, 3, steps + 5, np.random.default_rng(0)))
    for batch, same in zip(batches, longer, strict=False):
        np.testing.assert_array_equal(batch, same)


def test_every_epoch_has_an_order_of_its_own():
    first, second = batch_order(np.arange(30), 30, 2, None, np.random.default_rng(0))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(30))


# Steps ------------------------------------------------------------------------------------------------------------


def start_of(config: Config):
    federation = Federation(config)
    model = federation.build_model()
    return federation, model, random_state(model, model.shared)


def trained(config: Config, moments: State | None = None, state: State | None = None) -> tuple[float, State, State]:
    """Train the first client once from a random state: loss, state and moments."""
    federation, model, random = start_of(config)
    model.load(random if state is None else state)
    loss, kept = train_steps(
        model, federation.task, federation.rows, federation.index.train[federation.clients[0]], config.client,
        np.random.default_rng(0), partial(learning_rate, config.client, 1, 1), 5, moments or {}, model.trainable,
        federation.task.loss,
    )  # fmt: skip
    return loss, model.read(model.trainable), kept


def assert_near(one: State, other: State, tolerance: float = 2e-6) -> None:
    for key, value in other.items():
        torch.testing.assert_close(one[key], value, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("compose", ["tiny", "tiny_lm"])
def test_accumulated_batches_are_one_large_batch(request, compose: str):
    make = request.getfixturevalue(compose)
    knobs = ("client.optimizer=sgd", "client.lr=0.5", "client.local_epochs=2")
    whole = trained(make("client.batch_size=6", *knobs))
    for size, accumulation in ((2, 3), (3, 2), (1, 6)):
        parts = trained(make(f"client.batch_size={size}", f"client.grad_accumulation={accumulation}", *knobs))
        assert parts[0] == pytest.approx(whole[0], rel=1e-4)
        assert_near(parts[1], whole[1], 1e-5)


@pytest.mark.parametrize("compose", ["tiny", "tiny_lm"])
def test_accumulated_batches_of_unequal_size_are_weighted_by_what_they_hold(request, compose: str):
    make = request.getfixturevalue(compose)
    federation = start_of(make())[0]
    rows = len(federation.index.train[federation.clients[0]])
    knobs = ("client.optimizer=sgd", "client.lr=0.5")
    whole = trained(make("client.batch_size=64", *knobs))
    size = next(n for n in (2, 3, 4, 5) if rows % n)  # the last part is smaller than the others
    parts = trained(make(f"client.batch_size={size}", "client.grad_accumulation=40", *knobs))
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)
    assert_near(parts[1], whole[1], 1e-5)


def test_clipping_bounds_what_one_step_of_sgd_changes(tiny):
    knobs = ("client.optimizer=sgd", "client.lr=1.0", "client.local_steps=1", "client.batch_size=16")
    _, _, start = start_of(tiny())

    def change(*more: str) -> State:
        return {key: value - start[key] for key, value in trained(tiny(*knobs, *more))[1].items()}

    free, clipped = change(), change("client.max_grad_norm=0.01")
    norm = math.sqrt(sum(float(value.square().sum()) for value in clipped.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)
    scale = math.sqrt(sum(float(value.square().sum()) for value in free.values())) / 0.01
    assert scale > 2
    assert_near({key: value * scale for key, value in clipped.items()}, free, 1e-5)


def test_weight_decay_of_adamw_is_decoupled(tiny):
    knobs = ("client.lr=0.01", "client.local_steps=1", "client.batch_size=16")
    _, _, start = start_of(tiny())
    plain, decayed = trained(tiny(*knobs))[1], trained(tiny(*knobs, "client.weight_decay=0.5"))[1]
    assert_near(decayed, {key: value - 0.01 * 0.5 * start[key] for key, value in plain.items()})


def test_kept_moments_make_two_rounds_one_long_round(tiny):
    knobs = ("client.keep_optimizer=true", "client.batch_size=64")  # one batch holds all rows: no order to differ
    once = trained(tiny(*knobs, "client.local_steps=4"))
    first = trained(tiny(*knobs, "client.local_steps=2"))
    second = trained(tiny(*knobs, "client.local_steps=2"), first[2], first[1])
    assert_near(second[1], once[1], 1e-5)
    anew = trained(tiny(*knobs, "client.local_steps=2"), None, first[1])
    assert any(not torch.allclose(anew[1][key], value, rtol=1e-4, atol=1e-5) for key, value in once[1].items())
    assert trained(tiny("client.local_steps=1"))[2] == {}


def test_sgd_has_no_moments_to_keep(tiny):
    values = tiny().client.model_dump() | {"keep_optimizer": True, "optimizer": "sgd"}
    with pytest.raises(ValidationError, match="keeps no moments"):
        ClientConfig.model_validate(values)


def test_a_loss_that_is_not_finite_names_the_step(tiny):
    with pytest.raises(FedloraError, match="loss is nan at local step 2"):
        trained(tiny("client.optimizer=sgd", "client.lr=1e38", "client.batch_size=16", "client.local_steps=3"))


def test_gradient_checkpointing_gives_the_same_bits(tiny):
    plain, saved = (trained(tiny(f"backbone.gradient_checkpointing={flag}")) for flag in ("false", "true"))
    assert saved[0] == plain[0]
    assert_same(saved[1], plain[1])


def test_gradient_checkpointing_keeps_fewer_activations(tiny):
    def held(flag: str) -> int:
        federation, model, _ = start_of(tiny(f"backbone.gradient_checkpointing={flag}"))
        sizes: list[int] = []
        batch = federation.task.collate(federation.rows, np.arange(16))
        with (
            training_mode(model.module, 0),
            torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t),
        ):
            federation.task.loss(model.module, batch)
        return sum(sizes)

    assert held("true") < 0.6 * held("false")


def test_an_attention_implementation_is_the_one_that_runs(tiny):
    models = {name: Federation(tiny(f"backbone.attention={name}")).build_model() for name in ("eager", "sdpa")}
    assert [m.module.config._attn_implementation for m in models.values()] == ["eager", "sdpa"]


# The learning rate ------------------------------------------------------------------------------------------------


def rates(tiny, *knobs: str, rounds: int = 4, steps: int = 5) -> np.ndarray:
    """All learning rates of a run ``[rounds, steps]``."""
    settings = tiny("client.lr=1.0", *knobs).client
    return np.array([[learning_rate(settings, r + 1, rounds, s, steps) for s in range(steps)] for r in range(rounds)])


def test_a_constant_rate_is_constant(tiny):
    assert (rates(tiny) == 1.0).all()


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_over_the_run_falls_from_lr_to_nearly_zero(tiny, shape: str):
    found = rates(tiny, f"client.schedule={shape}").ravel()
    assert found[0] == 1.0
    assert (np.diff(found) < 0).all()
    assert 0 < found[-1] < 0.06
    middle = {"linear": 0.5, "cosine": 0.5}[shape]
    assert found[10] == pytest.approx(middle)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_with_restarts_is_the_same_in_every_round(tiny, shape: str):
    found = rates(tiny, f"client.schedule={shape}_restarts")
    assert (found == found[0]).all()
    np.testing.assert_allclose(found[0], rates(tiny, f"client.schedule={shape}", rounds=1)[0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "linear_restarts", "cosine_restarts"])
def test_warmup_rises_linearly_to_lr(tiny, schedule: str):
    found = rates(tiny, f"client.schedule={schedule}", "client.warmup=0.4")
    rising = found[0, :2] if schedule.endswith("_restarts") else found.ravel()[:8]
    np.testing.assert_allclose(rising, np.arange(1, len(rising) + 1) / len(rising))
    after = found[0, 2] if schedule.endswith("_restarts") else found.ravel()[8]
    assert after == pytest.approx(1.0)


@given(
    st.sampled_from(["constant", "linear", "cosine", "linear_restarts", "cosine_restarts"]),
    st.floats(0, 0.9), st.integers(1, 9), st.integers(1, 9), st.data(),
)  # fmt: skip
def test_a_rate_is_above_zero_and_at_most_lr(schedule, warmup, rounds, steps, data):
    settings = ClientConfig(
        batch_size=1, local_epochs=1, lr=0.1, optimizer="adamw", schedule=schedule, warmup=warmup, weight_decay=0.0,
        max_grad_norm=None, grad_accumulation=1, keep_optimizer=False, max_length=8,
    )  # fmt: skip
    server_round, step = data.draw(st.integers(1, rounds)), data.draw(st.integers(0, steps - 1))
    assert 0 < learning_rate(settings, server_round, rounds, step, steps) <= 0.1 + 1e-12
