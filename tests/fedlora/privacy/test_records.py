"""Private gradients: the cohort's equal those of Opacus, and those of dense arithmetic record by record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import Tensor

from fedlora.client import Worker
from fedlora.cohort import Member, train_alone, train_cohort
from fedlora.federation import Federation
from fedlora.privacy.hooks import record_losses
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.randomness import Seeded
from fedlora.privacy.records import private_gradients
from fedlora.store import ClientStore
from tests.conftest import Compose

ADAPTERS = ["fedit", "ffa", "fed_sb", "ravan", "orthogonal", "fedsa", "la_lora"]
CLIP, BATCH = 0.05, 4.0
SILENT = Mechanism(sample_rate=0.3, noise_multiplier=0.0, clip=CLIP, batch=BATCH, steps=4, seed=11)


@pytest.fixture
def worker(tiny: Compose, tmp_path: Path) -> Callable[..., Worker]:
    def build(*overrides: str) -> Worker:
        config = tiny("privacy=record", f"privacy.clip={CLIP}", "cohort.size=null", *overrides)
        made = Worker(Federation(config), ClientStore(tmp_path / "clients"))
        made.reset()
        return made

    return build


def member(worker: Worker, client: str, mechanism: Mechanism) -> Member:
    start = worker.model.read(worker.model.trainable)
    generator = torch.Generator().manual_seed(len(client) + ord(client[-1]))
    moved = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in start.items()}
    return replace(worker.member({**worker.start_of(client), **moved}, [client], 1, client), privacy=mechanism)


def by_hand(worker: Worker, state: dict[str, Tensor], rows: np.ndarray, mechanism: Mechanism) -> dict[str, Tensor]:
    """Every record alone: its gradient, clipped over all tensors; the sum over the expected batch."""
    model = worker.model
    model.load(state)
    model.own_trainables()
    sums = {key: torch.zeros_like(p) for key, p in zip(model.trainable, model.parameters(), strict=True)}
    for row in rows:
        loss = record_losses(model, worker.federation.task, worker.federation.rows, np.array([row])).sum()
        gradients = torch.autograd.grad(loss, model.parameters())
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for key, gradient in zip(model.trainable, gradients, strict=True):
            sums[key] += gradient * min(1.0, mechanism.clip / float(norm + 1e-6))
    return {key: value / mechanism.batch for key, value in sums.items()}


@pytest.mark.parametrize("setting", [*(f"method={method}" for method in ADAPTERS), "adapter=dora"])
def test_gradients_of_a_cohort_are_the_clipped_sums_of_single_records(
    worker: Callable[..., Worker], setting: str
) -> None:
    ours = worker(setting)
    assert ours.share_steps() is None
    axis = ours.trainer.axis
    assert axis is not None
    clients = ours.federation.clients[:3]
    members = [member(ours, client, SILENT) for client in clients]
    batches = [members[0].rows[:5], members[1].rows[:0], members[2].rows[:3]]  # one of them is empty
    keys = ours.model.per_client
    stacked = {key: torch.stack([m.state[key] for m in members]) for key in keys}
    leaves = {key: value.requires_grad_(key in ours.model.trainable) for key, value in stacked.items()}
    task, rows = ours.federation.task, ours.federation.rows
    draws = [SILENT.randomness() for _ in members]
    for size in (2, 8):  # whatever fits the memory at once
        found, losses = private_gradients(ours.model, axis, task, rows, leaves, batches, size, [SILENT] * 3, draws)
        assert losses.isnan().tolist() == [False, True, False]
        for place, (client, batch) in enumerate(zip(members, batches, strict=True)):
            state = {key: client.state[key] for key in keys}
            expected = by_hand(ours, state, batch, SILENT)
            norm = torch.stack([value.norm() for value in expected.values()]).norm()
            for key, value in expected.items():
                assert (found[key][place] - value).norm() <= 1e-5 * max(float(norm), 1e-3), key


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_a_cohort_trains_as_the_hooks_of_opacus_do(worker: Callable[..., Worker], method: str, noise: float) -> None:
    ours = worker(f"method={method}", "client.lr=0.01")
    ours.share_steps()
    assert ours.trainer.axis is not None
    clients = ours.federation.clients[:4]
    mechanism = replace(SILENT, noise_multiplier=noise)
    members = [member(ours, client, replace(mechanism, seed=i)) for i, client in enumerate(clients)]
    given = ours.federation.task, ours.federation.rows, ours.federation.config.client
    together = train_cohort(ours.model, ours.trainer.axis, *given, members)
    for each, found in zip(members, together, strict=True):
        alone = train_alone(ours.model, *given, each)
        assert found.loss == pytest.approx(alone.loss, abs=1e-5)
        for key, value in alone.state.items():
            assert (found.state[key] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), key


def test_a_client_alone_trains_as_stock_opacus_does(worker: Callable[..., Worker]) -> None:
    ours = worker("method=ffa", "client.optimizer=sgd", "client.lr=0.5")
    task, rows, model = ours.federation.task, ours.federation.rows, ours.model
    mechanism = replace(SILENT, noise_multiplier=1.3)
    each = member(ours, ours.federation.clients[0], mechanism)
    found = train_alone(model, task, rows, ours.federation.config.client, each)

    model.load(each.state)
    model.own_trainables()
    module = GradSampleModule(model.module, loss_reduction="sum")
    module.train()
    for dropout in (m for m in module.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.eval()
    draws = Seeded(mechanism.seed or 0)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5), noise_multiplier=1.3, max_grad_norm=CLIP,
        expected_batch_size=int(BATCH), generator=draws._noise,
    )  # fmt: skip
    for _ in range(mechanism.steps):
        batch = each.rows[draws.chosen(len(each.rows), mechanism.sample_rate)]
        optimizer.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *a, **k: None)
            record_losses(model, task, rows, batch).sum().backward()
        optimizer.step()
    module.remove_hooks()
    for key, value in found.state.items():
        expected = model.read([key])[key]
        assert (value - expected).abs().max() <= 1e-6, key


def test_noise_of_a_step_has_the_stated_deviation_and_is_fresh(worker: Callable[..., Worker]) -> None:
    ours = worker("method=ffa")
    ours.share_steps()
    axis, client = ours.trainer.axis, ours.federation.clients[0]
    assert axis is not None
    loud = replace(SILENT, noise_multiplier=2.0)
    one = member(ours, client, loud)
    leaves = {key: one.state[key][None].requires_grad_(key in ours.model.trainable) for key in ours.model.per_client}
    task, rows, draw = ours.federation.task, ours.federation.rows, loud.randomness()

    def gradient(mechanism: Mechanism) -> Tensor:
        found, _ = private_gradients(ours.model, axis, task, rows, leaves, [one.rows[:4]], 8, [mechanism], [draw])
        return torch.cat([value.flatten() for value in found.values()])

    silent = gradient(SILENT)
    noises = torch.stack([gradient(loud) - silent for _ in range(40)]) * BATCH / (2.0 * CLIP)
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], noises.numel()) / noises.numel()
    assert low < float(noises.double().square().mean()) < high
    assert stats.kstest(noises.flatten().double().numpy(), "norm").pvalue > 1e-4


def test_one_record_more_moves_the_sum_by_at_most_the_clip(worker: Callable[..., Worker]) -> None:
    ours = worker("method=fedit")
    ours.share_steps()
    axis, client = ours.trainer.axis, ours.federation.clients[0]
    assert axis is not None
    one = member(ours, client, SILENT)
    leaves = {key: one.state[key][None].requires_grad_(key in ours.model.trainable) for key in ours.model.per_client}
    given = ours.model, axis, ours.federation.task, ours.federation.rows, leaves

    def total(rows: np.ndarray) -> Tensor:
        found, _ = private_gradients(*given, [rows], 8, [SILENT], [SILENT.randomness()])
        return torch.cat([value.flatten() for value in found.values()]) * BATCH

    moved = [float((total(one.rows[: n + 1]) - total(one.rows[:n])).norm()) for n in range(1, 6)]
    assert max(moved) <= CLIP * (1 + 1e-4)
    assert max(moved) > 0.9 * CLIP  # the bound is reached: the gradients of records are larger than the clip
