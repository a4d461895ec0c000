"""The clients of a pFedLoRA run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.client import Worker
from fedlora.federation import Federation
from fedlora.store import ClientStore
from tests.conftest import Compose


@pytest.fixture
def worker(digits: Compose, tmp_path: Path) -> Worker:
    """The clients of a pFedLoRA run, before its first round."""
    return Worker(Federation(digits("pfedlora")), ClientStore(tmp_path))
