"""The benchmark from the command to its numbers, in real processes on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from simulations.benchmark import processes
from simulations.benchmark.variants import VARIANTS
from simulations.cli import main

TINY = ["--grid", "--clients", "3", "--rows", "2", "--lengths", "16", "--steps", "2", "--backbones", "2x32"]


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulations.benchmark", *TINY, *flags]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_every_variant_runs_each_round_once_and_trains_the_same(tmp_path: Path) -> None:
    done = bench("--variants", "central,loop", "--repeats", "1", "--json", "--write", str(tmp_path / "R.md"))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    [item] = document["workloads"]
    assert set(item["variants"]) == {"central", "loop"}
    for found in item["variants"].values():
        assert [answer["round"] for answer in found["answers"]] == [1, 2]
        assert {(a["clients"], a["rows"], a["tokens"]) for a in found["answers"]} == {(3, 12, 12 * 16)}
        assert all(answer["seconds"] > 0 and answer["peak_memory"] > 10**8 for answer in found["answers"])
    assert "| loop |" in (tmp_path / "R.md").read_text()


def test_an_unknown_name_is_bad_input(capfd: pytest.CaptureFixture[str]) -> None:
    done = bench("--variants", "lop")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'loop'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert main(["bench", "--only", "smal"]) == 2
    assert "There is no workload 'smal'" in capfd.readouterr().err


def test_settings_are_refused_because_the_workload_says_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "client.lr=1"])
    assert stop.value.code == 2
    assert "takes no settings" in capsys.readouterr().err


@pytest.mark.slow
def test_all_variants_train_the_same_rounds_to_tolerance() -> None:
    """Engines of ours and Flower with plain PEFT: the same losses in every round, so the same work."""
    done = bench("--repeats", "2", "--json")
    assert done.returncode == 0, done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)["workloads"][0]["figures"]}
    assert set(lines) == {variant.name for variant in VARIANTS}
    assert all(lines[name]["loss"]["difference"] is not None for name in lines if name not in ("loop", "central"))


def test_a_suspended_process_and_its_children_are_stopped_until_they_are_resumed() -> None:
    child = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    process = subprocess.Popen([sys.executable, "-c", child])
    try:
        while len(processes.tree(process.pid)) < 2:
            os.sched_yield()
        known = processes.tree(process.pid)
        processes.suspend(process.pid)
        while {each.status() for each in known} != {psutil.STATUS_STOPPED}:
            os.sched_yield()
        processes.resume(process.pid)
        while psutil.STATUS_STOPPED in {each.status() for each in known}:
            os.sched_yield()
        assert processes.peak_memory(process.pid) > sum(each.memory_info().rss for each in known) // 2
    finally:
        processes.end(processes.tree(process.pid))
        process.wait()
