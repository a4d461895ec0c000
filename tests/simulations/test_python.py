from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import fedlora
from fedlora.errors import InputError
from simulations.report import Report

SMALL = ["adapter.rank=4", "method=ffa", "rounds=2", "eval.every=1"]


def test_a_run_from_python_has_the_numbers_of_its_folder(tiny_overrides: list[str], tmp_path: Path) -> None:
    result = fedlora.simulate(*tiny_overrides, *SMALL, run_dir=tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert list(result.rounds["round"]) == [0, 1, 2]
    assert list(result.rounds["validation_accuracy"]) == [r["metrics"]["validation_accuracy"] for r in records]
    assert list(result.rounds["clients.mean"]) == [r["clients"]["mean"] for r in records]
    assert list(result.rounds["seconds.train"]) == [r["seconds"]["train"] for r in records]
    pd.testing.assert_frame_equal(result.ledger, pd.read_parquet(tmp_path / "run" / "ledger.parquet"))
    assert result.ledger["payload"].sum() == result.rounds[["payload_up", "payload_down"]].to_numpy().sum()
    assert result.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result.plot() == Report.of(tmp_path / "run").figures()["curve-rounds"]
    assert fedlora.Result(tmp_path / "run").summary == result.summary
    with pytest.raises(InputError, match=r"figure 'pie' is not there.*curve-rounds"):
        result.plot("pie")


def test_a_mistake_leaves_nothing_behind(tiny_overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean"):
        fedlora.simulate(*tiny_overrides, "client.lrr=1", run_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="holds no finished run"):
        fedlora.Result(tmp_path)


def test_importing_the_client_side_imports_nothing_above_it() -> None:
    code = "import fedlora.client, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"simulations", "strategies", "ray", "hydra"} & set(modules)
    with pytest.raises(AttributeError, match="has no attribute 'simulat'"):
        _ = fedlora.simulat
