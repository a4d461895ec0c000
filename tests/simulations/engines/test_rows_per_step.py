"""The measured size of a common step stays within the memory and within the clients of a round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlora.client import Worker
from fedlora.federation import Federation
from fedlora.store import ClientStore
from simulations.engines import rows_per_step
from tests.conftest import Compose
from tests.simulations.engines import helpers


def measured(compose: Compose, folder: Path, *settings: str, clients: int) -> int:
    worker = Worker(Federation(compose(*settings)), ClientStore(folder))
    assert worker.share_steps() is None
    rows = np.concatenate(list(worker.federation.index.train.values()))
    return rows_per_step.measured_tokens(worker.trainer, rows, 4, clients)


def test_a_step_is_no_larger_than_memory_and_clients_allow(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_per_step, "WORTH", 0.0)  # every step counts as faster
    monkeypatch.setattr(rows_per_step, "ON_CPU", (50, 100, 400, 800))
    monkeypatch.setattr(rows_per_step, "ON_GPU", (50, 100, 400, 800))
    assert measured(tiny, tmp_path / "1", clients=100) == 800
    assert measured(tiny, tmp_path / "2", clients=3) == 400
    assert measured(tiny, tmp_path / "3", f"task.name={helpers.__file__}:SmallMemory", clients=100) == 100
