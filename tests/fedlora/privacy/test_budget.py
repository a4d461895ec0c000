"""A client's budget covers everything it has ever released: retries, repeated rounds and resumes included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.config import PrivacyConfig
from fedlora.errors import FedloraError
from fedlora.privacy.accounting import Steps, epsilon_of
from fedlora.privacy.budget import Budget
from fedlora.privacy.mechanism import Mechanism
from fedlora.store import ClientStore

SIMULATED = Mechanism(sample_rate=0.1, noise_multiplier=1.0, clip=1.0, batch=10.0, steps=10, seed=5)
DEPLOYED = replace(SIMULATED, seed=None)


def budget(folder: Path, epsilon: float | None = None) -> Budget:
    privacy = PrivacyConfig(name="record", clip=1.0, epsilon=epsilon, delta=1e-3, noise_multiplier=1.0)
    return Budget(ClientStore(folder), privacy)


def after(rounds: int) -> float:
    return epsilon_of([Steps(1.0, 0.1, 10 * rounds)], 1e-3, "rdp")


def test_a_simulated_round_that_is_repeated_is_the_same_release(tmp_path: Path) -> None:
    for _ in range(3):
        for server_round in (1, 2):
            budget(tmp_path).admit("a", 100, server_round, SIMULATED)
    assert budget(tmp_path).spent("a", 100, 2, SIMULATED) == pytest.approx(after(2))
    assert budget(tmp_path).spent("a", 100, 1, SIMULATED) == pytest.approx(after(1))  # as it was then


def test_a_deployed_round_that_is_repeated_is_another_release(tmp_path: Path) -> None:
    for _ in range(3):
        budget(tmp_path).admit("a", 100, 1, DEPLOYED)
    assert budget(tmp_path).spent("a", 100, 1, DEPLOYED) == pytest.approx(after(3))


def test_a_client_that_would_overspend_sits_out_and_nothing_is_written_down(tmp_path: Path) -> None:
    ours = budget(tmp_path, epsilon=(after(2) + after(3)) / 2)
    ours.admit("a", 100, 1, DEPLOYED)
    ours.admit("a", 100, 2, DEPLOYED)
    before = ours.path("a").read_text()
    with pytest.raises(FedloraError, match=rf"sits out: it has spent epsilon {after(2):.3f} of"):
        ours.admit("a", 100, 3, DEPLOYED)
    assert ours.path("a").read_text() == before
    ours.admit("b", 100, 3, DEPLOYED)  # its own budget is untouched


def test_pruning_what_a_client_keeps_leaves_its_budget(tmp_path: Path) -> None:
    ours = budget(tmp_path)
    ours.admit("a", 100, 1, DEPLOYED)
    ours.store.prune("a", 5)
    assert budget(tmp_path).spent("a", 100, 5, DEPLOYED) == pytest.approx(after(1))
