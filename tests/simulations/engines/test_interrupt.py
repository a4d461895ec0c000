"""However a run ends, no process of Ray outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from fedlora.errors import InputError
from simulations.simulate import start
from tests.conftest import Compose
from tests.simulations.test_resume import KillAt, Killed

SETTINGS = ["engine=cohort", "engine.tokens=100", "engine.threads=1", "engine.workers=1", "adapter.rank=4"]
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves files open


def started_by(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def outliving(processes: list[psutil.Process], seconds: float = 20) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("signal_", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=str)
def test_a_run_that_is_stopped_leaves_no_process(tiny_overrides: list[str], tmp_path: Path, signal_: int) -> None:
    command = [sys.executable, "-m", "simulations.cli", "simulate", *tiny_overrides, *SETTINGS, "rounds=500"]
    errors = (tmp_path / "errors.txt").open("w")
    process = subprocess.Popen(
        [*command, f"run_dir={tmp_path / 'run'}"], stdout=errors, stderr=errors, start_new_session=True
    )
    lines = tmp_path / "run" / "rounds.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and len(lines.read_text().splitlines()) > 2) and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "errors.txt").read_text()
        time.sleep(0.05)
    processes = started_by(process.pid)
    assert any("TrainerProcess" in " ".join(each.cmdline()) for each in processes)
    os.killpg(process.pid, signal_)
    code = process.wait(60)
    errors.close()
    assert not outliving(processes)
    if signal_ == signal.SIGINT:
        assert code == 1
        assert "fedlora resume" in (tmp_path / "errors.txt").read_text()


def test_an_error_in_a_round_ends_ray_if_it_was_started_for_the_run(tiny: Compose, tmp_path: Path) -> None:
    before = set(started_by(os.getpid()))
    with pytest.raises(Killed):
        start(tiny(*SETTINGS), tmp_path / "run", callbacks=[KillAt(client=2)])
    assert not ray.is_initialized()
    assert not outliving([process for process in started_by(os.getpid()) if process not in before])


@pytest.mark.slow
def test_ray_that_was_there_before_is_still_there(tiny: Compose, tmp_path: Path) -> None:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        start(tiny(*SETTINGS, "rounds=1"), tmp_path / "run")
        with pytest.raises(InputError, match=r"with room for 1\. Lower one of them"):
            start(tiny(*SETTINGS, "engine.workers=2"), tmp_path / "more")
        assert ray.is_initialized()
    finally:
        ray.shutdown()
