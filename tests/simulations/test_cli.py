"""The command as a user meets it: real processes, exit statuses, one paragraph for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simulations.cli import main, sort_arguments

RUN = [sys.executable, "-m", "simulations.cli"]


def fedlora(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], check=False, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_flags_and_overrides_may_come_in_any_order() -> None:
    assert sort_arguments(["simulate", "a=1", "-m", "b=2", "--merged", "~c"]) == (
        ["simulate", "-m", "--merged"],
        ["a=1", "b=2", "~c"],
    )


def test_help_imports_no_heavy_library() -> None:
    code = "import sys; from simulations import cli; cli._parser().format_help(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "transformers", "flwr", "ray", "hydra", "pandas", "numpy"} & set(modules)


def test_help_names_every_command_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("simulate", "plan", "methods", "resume", "forget", "method=", "run_dir="):
        assert word in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["client.lrr=1"], r"Unknown setting 'client.lrr'. Did you mean 'client.lr'?"),
        (["clinet.lr=1"], r"Unknown setting 'clinet.lr'. Did you mean 'client.lr'?"),
        (["client.lr=fast"], r"Setting 'client.lr' = 'fast' is not valid"),
        (["method=fedsb"], r"There is no method=fed"),
        (["adapter.basis=seeded"], r"Unknown setting 'adapter.basis'"),
        (["strategy=custom"], r"strategy._target_"),
        (["strategy._target_=./nowhere.py:X"], r"does not exist"),
        (["data=csv"], r"data.path"),
        (["data=csv", "data.path=missing.csv"], r"data.path"),
        (["data.split.test=0.9"], r"validation + test must be below 1"),
        (["rounds=-1"], r"Setting 'rounds' = -1 is not valid"),
        (["cohort.size=100000"], r"cohort.size = 100000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_paragraph_and_exit_status_two(
    overrides: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *overrides, "run_dir=here"]) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_typo_in_a_group_option_names_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "method=fed_bs"]) == 2
    assert "Did you mean 'fed_sb'?" in capfd.readouterr().err


def test_debug_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "client.lr=fast", "--debug"]) == 2
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.slow
def test_simulate_and_sweep_in_a_real_process(tiny_overrides: list[str], tmp_path: Path) -> None:
    small = [*tiny_overrides, "adapter.rank=4", "rounds=1"]
    one = fedlora("simulate", *small, "run_dir=one", "--merged", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert "fedit" in one.stdout
    assert one.stderr.strip() == ""
    assert (tmp_path / "one" / "summary.json").exists()
    assert (tmp_path / "one" / "merged" / "config.json").exists()
    sweep = fedlora("simulate", "-m", *small, "method=zero_shot,ffa", "seed=1,2", "run_dir=sweep", cwd=tmp_path)
    assert sweep.returncode == 0, sweep.stderr
    assert len(list((tmp_path / "sweep").glob("*/summary.json"))) == 4
    again = fedlora("simulate", *small, "run_dir=one", cwd=tmp_path)
    assert again.returncode == 2
    assert "already holds a finished run" in again.stderr


def test_a_failed_trial_is_reported_and_the_sweep_goes_on(tiny_overrides: list[str], tmp_path: Path) -> None:
    small = [*tiny_overrides, "adapter.rank=4", "rounds=1", "method=ffa"]
    sweep = fedlora("simulate", "-m", *small, "client.lr=1e30,1e-2", "client.local_epochs=3", "run_dir=s", cwd=tmp_path)
    assert sweep.returncode == 2
    assert "Lower client.lr" in sweep.stderr
    assert [path.parent.name for path in (tmp_path / "s").glob("*/summary.json")] == ["1"]


def test_plan_and_methods_print_one_json_document(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--json", *tiny_overrides, "adapter.rank=4"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"upload_params", "download_params", "setup_params", "trainable_params", "total_bytes"} <= set(plan)
    assert plan["transport_up"] + plan["transport_down"] == plan["total_transport_bytes"] > plan["total_bytes"]
    assert main(["plan", "--json", "--compare", *tiny_overrides, "adapter.rank=2"]) == 0
    captured = capsys.readouterr()
    compared = [item["method"] for item in json.loads(captured.out)["methods"]]
    assert main(["methods", "--json"]) == 0
    listed = [item["method"] for item in json.loads(capsys.readouterr().out)["methods"]]
    assert {"fedit", "fed_sb", "disjoint"} <= set(compared)
    assert compared == [method for method in listed if f"method={method} is left out:" not in captured.err]


def test_a_comparison_leaves_out_what_the_settings_do_not_suit_and_says_why(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--json", "--compare", *tiny_overrides, "adapter.rank=8"]) == 0
    captured = capsys.readouterr()
    assert "disjoint" not in [item["method"] for item in json.loads(captured.out)["methods"]]
    assert "method=disjoint is left out: adapter=orthogonal[disjoint] gives each of" in captured.err
    assert main(["plan", "--compare", *tiny_overrides, "rounds=-1"]) == 2
    assert "Setting 'rounds' = -1 is not valid" in capsys.readouterr().err


def test_resume_takes_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["resume", "somewhere", "seed=2"])
    assert stop.value.code == 2
