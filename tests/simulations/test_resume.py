"""Promise 6: a killed run resumes to the same final bits, wherever it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from fedlora.errors import InputError
from simulations.callbacks import Callback
from simulations.compose import compose_config
from simulations.simulate import resume, start
from tests.conftest import Compose
from tests.simulations.test_rounds import without_time

CASES = {
    "fedex": ["method=fedex"],
    "fed_sb": ["method=fed_sb"],
    "local": ["method=local"],
    "private head": ["method=ffa", "adapter.head=private"],
    "FedAdam": ["strategy._target_=flwr.serverapp.strategy.FedAdam"],
    "flora": ["method=flora", "adapter.client_ranks=[4,2,1]", "adapter.head=private"],
    "flexlora": ["method=flexlora", "adapter.client_ranks=[4,2,1]"],
    "fed_sb, gradients of clients": ["method=fed_sb", "adapter.basis=client_gradient"],
    "fed_sb, a new basis": ["method=fed_sb", "strategy.refresh=2"],
    "fed_sb, a new basis that clients draw": ["method=fed_sb", "adapter.basis=seeded", "strategy.refresh=1"],
    "fedsvd": ["method=fedsvd", "strategy.refresh=2"],
    "fedsa": ["method=fedsa", "engine=cohort"],
    "rolora": ["method=rolora", "client.keep_optimizer=true"],
    "personal_lora": ["method=personal_lora", "client.keep_optimizer=true", "engine=cohort"],
    "cohorts": ["method=fedex", "engine=cohort"],
    "cohorts of clients with a state": [
        "method=local",
        "engine=auto",
        "engine.tokens=150",
        "client.keep_optimizer=true",
    ],
    "every two rounds": ["method=fedex", "checkpoint.every=2"],
}


class Killed(BaseException):
    """Stands for a process that dies between two statements: nothing after it runs."""


class KillAt(Callback):
    """Dies before the n-th client answer, or after the line of a round is written but before its checkpoint."""

    def __init__(self, *, client: int | None = None, round_end: int | None = None) -> None:
        self.client, self.round_end, self.answers = client, round_end, 0

    def on_client(self) -> None:
        self.answers += 1
        if self.answers == self.client:
            raise Killed

    def on_round_end(self, record: Mapping[str, Any]) -> None:
        if record["round"] == self.round_end:
            raise Killed


def assert_same_run(one: Path, two: Path) -> None:
    assert without_time(one) == without_time(two)
    pd.testing.assert_frame_equal(pd.read_parquet(one / "ledger.parquet"), pd.read_parquet(two / "ledger.parquet"))
    for path in sorted([*one.glob("adapter/*.safetensors"), *one.glob("clients/*/*.safetensors")]):
        expected, actual = load_file(path), load_file(two / path.relative_to(one))
        assert expected.keys() == actual.keys()
        assert all(expected[key].equal(actual[key]) for key in expected), path.name


KILLS: list[dict[str, int]] = [{"client": 3}, {"client": 7}, {"client": 12}, {"round_end": 0}, {"round_end": 3}]
EVERYWHERE = {"fedex", "fed_sb", "cohorts"}
"""Killed at every place; the others at two, and with the slow tests at all."""


@pytest.fixture(scope="module")
def whole(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a case that nothing has interrupted."""

    @cache
    def run(case: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        start(compose_config([*tiny_overrides, "adapter.rank=4", *CASES[case]]), folder)
        return folder

    return run


@pytest.mark.parametrize(
    ("case", "kill"),
    [
        pytest.param(case, kill, marks=[] if case in EVERYWHERE or kill in (KILLS[1], KILLS[3]) else pytest.mark.slow)
        for case in CASES
        for kill in KILLS
    ],
    ids=str,
)
def test_a_killed_run_resumes_to_the_same_bits(
    tiny: Compose, tmp_path: Path, whole: Callable[[str], Path], case: str, kill: dict[str, int]
) -> None:
    with pytest.raises(Killed):
        start(tiny(*CASES[case]), tmp_path / "killed", callbacks=[KillAt(**kill)])
    assert not (tmp_path / "killed" / "summary.json").exists()
    resume(tmp_path / "killed")
    assert_same_run(whole(case), tmp_path / "killed")


def test_a_run_killed_twice_resumes_to_the_same_bits(tiny: Compose, tmp_path: Path) -> None:
    config = tiny("method=fedex", "rounds=4")
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(client=6)])
    with pytest.raises(Killed):
        resume(tmp_path / "killed", callbacks=[KillAt(client=8)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_kill_minus_nine_in_a_real_process(tiny: Compose, tmp_path: Path, tiny_overrides: list[str]) -> None:
    overrides = [*tiny_overrides, "adapter.rank=4", "method=fedex", "rounds=30", "eval.every=30"]
    command = [sys.executable, "-m", "simulations.cli", "simulate", *overrides]
    start(tiny("method=fedex", "rounds=30", "eval.every=30"), tmp_path / "whole")
    process = subprocess.Popen([*command, f"run_dir={tmp_path / 'killed'}"], stdout=subprocess.DEVNULL)
    lines = tmp_path / "killed" / "rounds.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and len(lines.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    finished = subprocess.run(
        [sys.executable, "-m", "simulations.cli", "resume", str(tmp_path / "killed")], check=False, capture_output=True
    )
    assert finished.returncode == 0, finished.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_resuming_a_finished_run_changes_nothing(tiny: Compose, tmp_path: Path) -> None:
    summary = start(tiny("method=ffa"), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert resume(tmp_path / "run") == summary
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_resume_needs_a_run_and_checkpoints(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        resume(tmp_path)
    with pytest.raises(Killed):
        start(tiny("checkpoint.every=0"), tmp_path / "run", callbacks=[KillAt(client=2)])
    with pytest.raises(InputError, match=r"checkpoint\.every=0"):
        resume(tmp_path / "run")


def test_config_yaml_says_what_was_chosen_automatically(tiny: Compose, tmp_path: Path) -> None:
    start(tiny("engine=auto", "method=zero_shot"), tmp_path / "run")
    engine = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["engine"]
    assert engine["name"] == "loop"
    assert engine["threads"] >= 1
