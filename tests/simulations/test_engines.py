"""Engines are interchangeable: the same seed gives the same numbers and the same bytes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from fedlora.errors import InputError
from simulations.simulate import start
from tests.conftest import Compose
from tests.simulations.test_rounds import rounds_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Ray leaves its own sockets, files and processes to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.parametrize("method", ["fedex", "fed_sb"])
def test_flower_engine_equals_the_loop_engine(tiny: Compose, tmp_path: Path, method: str) -> None:
    start(tiny(f"method={method}", "engine=loop"), tmp_path / "loop")
    summary = start(tiny(f"method={method}", "engine=flower", "engine.workers=2"), tmp_path / "flower")
    assert summary["failures"] == 0
    loop, flower = (load_file(tmp_path / n / "adapter" / "fedlora_state.safetensors") for n in ("loop", "flower"))
    for key, value in loop.items():
        assert value.sub(flower[key]).abs().max() <= 1e-6, key
    ledgers = [pd.read_parquet(tmp_path / name / "ledger.parquet") for name in ("loop", "flower")]
    columns = ["round", "client", "direction", "payload", "setup", "status"]
    pd.testing.assert_frame_equal(ledgers[0][columns], ledgers[1][columns])
    # Flower's run and task ids are random numbers of a few bytes more than ours.
    assert (ledgers[1]["message"] - ledgers[0]["message"]).abs().max() <= 40
    for one, two in zip(rounds_of(tmp_path / "loop"), rounds_of(tmp_path / "flower"), strict=True):
        assert one["cohort"] == two["cohort"]
        assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-6)


def test_a_failure_under_flower_is_told_as_under_the_loop_engine(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every client failed.*Lower client\.lr"):
        start(tiny("client.lr=1e30", "client.local_epochs=3", "engine=flower"), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
