from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedlora.config import Config
from simulations.cli import main
from simulations.engines.pool import Pools
from simulations.launch import best
from simulations.simulate import start
from simulations.sweep import run_trial
from simulations.trials import Trial, TrialLog, fingerprint
from tests.conftest import Compose
from tests.simulations.test_cli import fedlora
from tests.simulations.test_resume import KillAt, Killed, assert_same_run


def trials(folder: Path) -> list[Trial]:
    return [trial for trial in TrialLog(folder).read() if trial.status != "started"]


def ran(config: Config, folder: Path) -> Trial:
    composed = OmegaConf.create(config.model_dump())
    return run_trial(composed, folder, [], merged=False, pools=Pools())[0]


def test_a_repeated_sweep_keeps_what_is_finished_and_runs_what_is_new(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["simulate", "-m", *tiny_overrides, "adapter.rank=4", "rounds=1", "run_dir=sweep"]
    assert main([*command, "method=ffa", "seed=1,2"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/*")}
    assert main([*command, "method=zero_shot,ffa", "seed=2,1"]) == 0
    shown = capfd.readouterr()
    assert Counter(trial.status for trial in trials(tmp_path / "sweep")[2:]) == {"finished": 2, "kept": 2}
    assert {path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json")} == {"0", "1", "2", "3"}
    assert all(path.stat().st_mtime_ns == when for path, when in before.items() if path.is_file())
    assert "note: method=ffa seed=1: finished already, in 0/" in shown.err
    assert sum(line.startswith("│ ffa") for line in shown.out.splitlines()) == 2 + 2
    assert "4 trials: 2 finished, 2 kept." in shown.out


def test_a_repeated_sweep_resumes_what_was_interrupted_to_the_same_bits(tiny: Compose, tmp_path: Path) -> None:
    config = tiny("method=fedex")
    start(config, tmp_path / "whole")
    log = TrialLog(tmp_path / "sweep")
    log.add(Trial([], fingerprint(config), "0", "started"))
    with pytest.raises(Killed):
        start(config, tmp_path / "sweep" / "0", callbacks=[KillAt(round_end=2)])
    trial = ran(config, tmp_path / "sweep" / "5")
    assert (trial.status, trial.folder) == ("finished", "0")
    assert_same_run(tmp_path / "whole", tmp_path / "sweep" / "0")


def test_a_place_that_another_trial_has_is_not_written_over(tiny: Compose, tmp_path: Path) -> None:
    for seed, folder in ((1, "0"), (2, "1")):
        assert ran(tiny("rounds=1", "method=zero_shot", f"seed={seed}"), tmp_path / "0").folder == folder


def test_an_incompatible_pair_is_skipped_with_a_line(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["simulate", "-m", *tiny_overrides, "adapter.rank=4", "rounds=1", "run_dir=sweep", "strategy=average"]
    assert main([*command, "adapter=lora,ffa"]) == 0
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("skipped: adapter=lora: ")
    assert [path.parent.name for path in (tmp_path / "sweep").glob("*/config.yaml")] == ["1"]
    assert main([*command, "adapter=lora", "seed=1,2"]) == 2


def test_a_setting_that_only_the_swept_methods_have_is_taken(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["simulate", "-m", *tiny_overrides, "adapter.rank=2", "rounds=1", "run_dir=sweep"]
    assert main([*command, "method=disjoint,o_lora", "adapter.groups=4"]) == 0
    shown = capfd.readouterr()
    assert "trial" not in shown.out.splitlines()[2]  # nothing but the method sets them apart
    assert main([*command, "method=disjoint,o_lora", "adapter.grups=4"]) == 2
    assert "Unknown setting 'adapter.grups'." in capfd.readouterr().err


@pytest.mark.slow
def test_trials_in_processes_of_their_own_give_the_table_and_the_exit_status(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    command = [
        "simulate",
        "-m",
        *tiny_overrides,
        "adapter.rank=4",
        "rounds=1",
        "run_dir=sweep",
        "client.local_epochs=3",
    ]
    local = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "method=ffa", "client.lr=1e-2,1e30"]
    done = fedlora(*command, *local, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "failed: client.lr=1e+30: Round 1: every client failed." in done.stderr
    assert "2 trials: 1 failed, 1 finished." in done.stdout
    assert [trial.status for trial in sorted(trials(tmp_path / "sweep"), key=lambda t: t.status)] == [
        "failed",
        "finished",
    ]


def test_optuna_searches_for_the_best_validation_value(tiny_overrides: list[str], tmp_path: Path) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=3"]
    space = ["hydra.sweeper.n_jobs=1", "client.lr=choice(1e-4,1e-2,1e30)", "client.local_epochs=3"]
    done = fedlora(
        "simulate", "-m", *tiny_overrides, "adapter.rank=4", "rounds=1", "run_dir=s", *search, *space, cwd=tmp_path
    )
    found = yaml.safe_load((tmp_path / "s" / "optimization_results.yaml").read_text())
    finished = [t for t in trials(tmp_path / "s") if t.status != "failed"]
    values = [best(json.loads((tmp_path / "s" / t.folder / "summary.json").read_text())) for t in finished]
    assert found["best_value"] == max(values), done.stderr


def test_the_fingerprint_is_of_the_configuration_and_not_of_its_folder(tiny: Compose) -> None:
    assert fingerprint(tiny("run_dir=a")) == fingerprint(tiny("run_dir=b"))
    assert fingerprint(tiny("client.lr=1e-3")) != fingerprint(tiny("client.lr=2e-3"))


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=20), max_size=3), st.integers(1, 40))
def test_a_line_cut_short_by_a_crash_costs_itself(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str], cut: int
) -> None:
    log = TrialLog(tmp_path_factory.mktemp("sweep"))
    log.add(Trial(overrides, "key", "0", "started"))
    whole = log.file.read_bytes()
    log.add(Trial(overrides, "key", "0", "finished"))
    log.file.write_bytes(log.file.read_bytes()[: len(whole) + cut])
    assert log.read() == [Trial(overrides, "key", "0", "started")]
    log.add(Trial(overrides, "key", "1", "started"))
    assert [trial.folder for trial in log.read()] == ["0", "1"]


def test_what_a_trial_returns_is_its_best_validation_value(tiny: Compose, tmp_path: Path) -> None:
    summary = start(tiny("rounds=1"), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert best(summary) == max(line["metrics"]["validation_accuracy"] for line in lines)
