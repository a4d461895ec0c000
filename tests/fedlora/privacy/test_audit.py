"""Audits of what clients release: nothing refutes the claimed epsilon, and whatever weakens the mechanism shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.adapters import State
from fedlora.client import Worker
from fedlora.cohort import train_cohort
from fedlora.federation import Federation
from fedlora.privacy import records
from fedlora.privacy.audit import epsilon_at_least
from fedlora.privacy.budget import Budget
from fedlora.privacy.mechanism import Mechanism, mechanism_for
from fedlora.privacy.randomness import Seeded
from fedlora.privacy.records import private_gradients
from fedlora.seeding import derive_seed
from fedlora.store import ClientStore
from tests.conftest import Compose

DELTA, RATE, CLIP = 0.01, 0.01, 0.05
THRESHOLDS = np.arange(-1.0, 6.0, 0.5).tolist()
SETTINGS = [
    "method=ffa", "cohort.size=null", "client.optimizer=sgd", f"client.lr={RATE}", "client.weight_decay=0.0",
    "privacy=record", f"privacy.clip={CLIP}", f"privacy.delta={DELTA}", "privacy.epsilon=null",
    "privacy.accountant=prv",
]  # fmt: skip


# The bound itself ---------------------------------------------------------------------------------------------------


def test_the_bound_of_randomised_response_is_near_its_epsilon_and_holds_with_its_confidence() -> None:
    epsilon, rng = math.log(3), np.random.default_rng(0)
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    found = [
        epsilon_at_least(rng.random(4000) >= truth, rng.random(4000) < truth, [1.0], 0.0, confidence=0.9)
        for _ in range(200)
    ]
    assert min(found) > 0.85 * epsilon
    assert np.mean(np.array(found) > epsilon) < 0.1


def test_nothing_is_shown_about_releases_that_are_alike() -> None:
    rng = np.random.default_rng(0)
    assert epsilon_at_least(rng.normal(size=1000), rng.normal(size=1000), THRESHOLDS, 0.0) == 0.0


@pytest.mark.parametrize("turned", [False, True])
def test_either_kind_of_error_can_refute_a_claim(turned: bool) -> None:
    rng = np.random.default_rng(0)
    rare, never = (rng.random(1000) < 0.3).astype(float), np.zeros(1000)  # a release that only one world makes
    without, within = (1 - rare, never + 1) if turned else (never, rare)
    found = epsilon_at_least(without, within, [0.5], 0.01)
    assert 3.5 < found < math.log(1000)


# What a client releases ---------------------------------------------------------------------------------------------


@dataclass
class Attack:
    """Somebody who knows the start, all records and the mechanism, and sees what a client has after its rounds."""

    worker: Worker
    mechanism: Mechanism
    rows: np.ndarray

    @classmethod
    def on(cls, tiny: Compose, folder: Path, records: int, *overrides: str) -> Attack:
        """Attack a client that is said to have ``records`` rows; it has two, or one: the first is the canary."""
        worker = Worker(Federation(tiny(*SETTINGS, *overrides)), ClientStore(folder))
        worker.reset()
        assert worker.share_steps() is None
        federation = worker.federation
        config, client = federation.config, federation.clients[0]
        mechanism = mechanism_for(config.privacy, config.client, config.rounds, client, records, 0)
        return cls(worker, mechanism, federation.index.train[client][:2])

    def claimed(self, rounds: int) -> float:
        """Epsilon that the client's budget says after ``rounds`` rounds."""
        client, count = self.worker.federation.clients[0], len(self.rows)
        assert self.worker.budget is not None
        for server_round in range(1, rounds + 1):
            self.worker.budget.admit(client, count, server_round, self.mechanism)
        return self.worker.budget.spent(client, count, rounds, self.mechanism)

    def shown(self, rounds: int = 1, repeats: int = 2000) -> float:
        """Epsilon that repeated trainings with and without the canary show."""
        start = self.worker.start_of(self.worker.federation.clients[0])
        canary, others = self._gradient(self.rows[:1], start), self._gradient(self.rows[1:], start)
        without = self._scores(self.rows[1:], start, canary, others, rounds, repeats)
        within = self._scores(self.rows, start, canary, others, rounds, repeats)
        return epsilon_at_least(without, within, THRESHOLDS, DELTA)

    def _gradient(self, rows: np.ndarray, state: State) -> State:
        """What ``rows`` add to the gradient of a step that they are in, of the norm clip / batch for one row."""
        worker, silent = self.worker, replace(self.mechanism, noise_multiplier=0.0)
        leaves = {key: state[key][None].requires_grad_() for key in worker.model.trainable}
        given = worker.model, worker.trainer.axis, worker.federation.task, worker.federation.rows, leaves
        found, _ = private_gradients(*given, [rows], 8, [silent], [silent.randomness()])  # pyright: ignore
        return {key: value[0] for key, value in found.items()}

    def _scores(
        self, rows: np.ndarray, start: State, canary: State, others: State, rounds: int, repeats: int
    ) -> np.ndarray:
        """How far each release lies along the canary's gradient; of deviation 1 without it, if all is right."""
        worker, mechanism = self.worker, self.mechanism
        federation, axis, client = worker.federation, worker.trainer.axis, worker.federation.clients[0]
        assert axis is not None
        states = [start] * repeats
        for server_round in range(rounds):
            one = replace(worker.member(start, [client], server_round + 1, client), rows=rows)
            seeds = [derive_seed(0, "audit", server_round, len(rows), i) for i in range(repeats)]
            members = [
                replace(one, state=state, privacy=replace(mechanism, seed=seed))
                for state, seed in zip(states, seeds, strict=True)
            ]
            trained = train_cohort(
                worker.model, axis, federation.task, federation.rows, federation.config.client, members
            )
            states = [{**start, **each.state} for each in trained]
        steps, unit = rounds * mechanism.steps, CLIP / mechanism.batch
        along = torch.zeros(repeats)
        for key, direction in canary.items():
            moved = (start[key] - torch.stack([state[key] for state in states])) / RATE
            expected = steps * mechanism.sample_rate * others[key]
            along += ((moved - expected) * direction).flatten(1).sum(1) / unit
        return (along / (mechanism.noise_multiplier * unit * steps**0.5)).numpy()


NOISE = "privacy.noise_multiplier"
FULL, DRAWN = ["client.batch_size=4", f"{NOISE}=1.0"], ["client.batch_size=1", "client.local_steps=1", f"{NOISE}=0.7"]


@pytest.mark.parametrize("settings", [FULL, DRAWN], ids=["every row in every step", "rows drawn at random"])
def test_what_is_shown_is_near_what_is_claimed_and_not_above(
    tiny: Compose, tmp_path: Path, settings: list[str]
) -> None:
    attack = Attack.on(tiny, tmp_path, 2, *settings)
    claimed, shown = attack.claimed(1), attack.shown()
    assert 0.3 * claimed < shown <= claimed


def no_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Seeded, "normal", lambda self, shape, std: torch.zeros(tuple(shape)))


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    whole = Seeded.normal
    patch.setattr(Seeded, "normal", lambda self, shape, std: whole(self, shape, std / 2))


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(records, "shrinkage", lambda norms, clips: torch.ones_like(norms))


@pytest.mark.parametrize(("plant", "repeats"), [(no_noise, 400), (half_the_noise, 2000), (no_clipping, 400)])
def test_a_weakened_mechanism_shows_more_than_is_claimed(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable, repeats: int
) -> None:
    attack = Attack.on(tiny, tmp_path, 2, *FULL)
    plant(monkeypatch)
    shown = attack.shown(repeats=repeats)
    assert shown > attack.claimed(1)


def test_rows_that_are_in_every_step_show_more_than_is_claimed_for_a_draw(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = Attack.on(tiny, tmp_path, 8, *DRAWN)
    assert attack.mechanism.sample_rate == 1 / 8
    monkeypatch.setattr(Seeded, "chosen", lambda self, rows, rate: np.arange(rows))
    assert attack.shown(repeats=500) > attack.claimed(1)


def test_an_account_that_starts_anew_in_every_round_claims_less_than_is_shown(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = Attack.on(tiny, tmp_path, 2, *FULL)
    shown = attack.shown(rounds=9, repeats=500)
    assert shown <= attack.claimed(9)
    whole = Budget._costs
    monkeypatch.setattr(Budget, "_costs", lambda *given: whole(*given)[-1:])
    assert shown > attack.claimed(9)
