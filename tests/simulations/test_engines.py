"""Engines are interchangeable: the same seed gives the same numbers and the same bytes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from simulations.simulate import start
from tests.conftest import Compose
from tests.simulations.test_cli import fedlora
from tests.simulations.test_rounds import rounds_of


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(["method=fedex"], marks=pytest.mark.slow),
        ["method=fed_sb"],
        pytest.param(["method=flexlora", "adapter.client_ranks=[4,2,1]"], marks=pytest.mark.slow),  # it asks
    ],
    ids=" ".join,
)
def test_flower_engine_equals_the_loop_engine(
    tiny: Compose, tiny_overrides: list[str], tmp_path: Path, method: list[str]
) -> None:
    start(tiny(*method, "engine=loop"), tmp_path / "loop")
    settings = [*tiny_overrides, *method, "adapter.rank=4", "engine=flower", "engine.workers=2"]
    process = fedlora("simulate", *settings, f"run_dir={tmp_path / 'flower'}")
    assert process.returncode == 0, process.stderr
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


@pytest.mark.slow
def test_a_failure_under_flower_is_told_as_under_the_loop_engine(tiny_overrides: list[str], tmp_path: Path) -> None:
    settings = [*tiny_overrides, "adapter.rank=4", "client.lr=1e30", "client.local_epochs=3", "engine=flower"]
    process = fedlora("simulate", *settings, f"run_dir={tmp_path / 'run'}")
    assert process.returncode == 2
    assert "every client failed" in process.stderr
    assert "Lower client.lr" in process.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_flower_without_ray_ends_the_run_and_says_why(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))  # too long for the sockets that Ray puts there
    settings = [*tiny_overrides, "adapter.rank=4", "engine=flower"]
    process = fedlora("simulate", *settings, f"run_dir={tmp_path / 'run'}")
    assert process.returncode == 1
    assert "engine=flower: Flower's simulation did not run on Ray" in process.stderr
    assert "AF_UNIX path length" in process.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
