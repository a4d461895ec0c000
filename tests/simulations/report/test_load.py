"""Which runs a report takes, which belong together, and that their numbers are those of the run folders."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fedlora.errors import InputError
from simulations.report.load import find, load


@pytest.fixture
def copy(sweep: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies a run of the sweep, with settings changed: ``copy("fedit-1", "other", rounds=4)``."""

    def copied(name: str, to: str, **settings: object) -> Path:
        target = tmp_path / "runs" / to
        shutil.copytree(sweep / name, target)
        config = yaml.safe_load((target / "config.yaml").read_text())
        for key, value in settings.items():
            *groups, last = key.split("__")
            place = config
            for group in groups:
                place = place[group]
            place[last] = value
        (target / "config.yaml").write_text(yaml.safe_dump(config))
        return target

    return copied


def test_folders_sweeps_and_patterns_name_the_same_runs(sweep: Path) -> None:
    assert find([sweep]) == find([sweep / "*"]) == find([str(sweep.parent / "**" / "*-[12]")])
    assert len(find([sweep, sweep / "fedit-1"])) == 10


def test_numbers_are_those_of_the_run_folders(sweep: Path) -> None:
    (section,) = load([sweep])
    ledgers = {path.parent: pd.read_parquet(path) for path in sweep.glob("*/ledger.parquet")}
    for _, row in section.runs.iterrows():
        summary = json.loads((Path(row["folder"]) / "summary.json").read_text())
        assert row["score"] == summary["final"]["metrics"]["seen_accuracy"]
        assert row["clients_worst_decile"] == summary["final"]["clients"]["worst_decile"]
        assert row["bytes"] == ledgers[Path(row["folder"])]["message"].sum()
        rounds = section.rounds[section.rounds["folder"] == row["folder"]]
        assert rounds["bytes"].iloc[-1] == row["bytes"]
        assert rounds["score"].iloc[-1] == row["score"]


def test_scores_are_taken_on_rows_that_every_run_has(sweep: Path) -> None:
    assert load([sweep])[0].split == "seen"
    (section,) = load([sweep], "test")
    assert section.runs.loc[section.runs["kind"] == "local", "score"].isna().all()
    with pytest.raises(InputError, match="No run has accuracy on rows of unseen clients"):
        load([sweep / "local-1"], "test")


def test_unfinished_runs_are_named_and_left_out(copy: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    whole, cut = copy("fedit-1", "whole"), copy("ffa-1", "cut")
    (cut / "summary.json").unlink()
    with caplog.at_level(logging.WARNING, "fedlora.notices"):
        (section,) = load([whole.parent])
    assert list(section.runs["method"]) == ["fedit"]
    assert str(cut) in caplog.text
    with pytest.raises(InputError, match="None of these runs is finished"):
        load([cut])


def test_runs_on_other_data_are_a_section_that_says_why(copy: Callable[..., Path]) -> None:
    copy("fedit-1", "one")
    folder = copy("ffa-1", "two", data__limit=100).parent
    one, two = load([folder])
    assert (one.differs, two.differs) == ({"data.limit": None}, {"data.limit": 100})
    assert one.title != two.title


def test_runs_of_one_method_are_named_by_what_they_differ_in(copy: Callable[..., Path]) -> None:
    copy("fedit-1", "slow")
    folder = copy("fedit-2", "fast", client__lr=0.5).parent
    (section,) = load([folder])
    assert "fedit lr=0.5" in set(section.runs["method"])
    assert len(set(section.runs["method"])) == 2


def test_a_run_made_twice_counts_once(copy: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    copy("fedit-1", "first")
    again = copy("fedit-1", "second", run_dir="elsewhere")
    with caplog.at_level(logging.WARNING, "fedlora.notices"):
        (section,) = load([again.parent])
    assert list(section.runs["folder"]) == [str(again)]
    assert "is another run of fedit with seed 1" in caplog.text


@pytest.mark.parametrize(
    ("file", "text"),
    [(file, text) for file in ("summary.json", "rounds.jsonl") for text in ("{", "[]", "{}")]
    + [("config.yaml", "{"), ("config.yaml", "[]")],
)
def test_a_damaged_file_names_its_run(copy: Callable[..., Path], file: str, text: str) -> None:
    folder = copy("fedit-1", "damaged")
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=f"'{folder}' cannot be read"):
        load([folder])


def test_no_runs_are_refused(tmp_path: Path) -> None:
    for paths, message in (([], "No runs are given"), ([tmp_path], "holds no run"), (["no*"], "There is no run at")):
        with pytest.raises(InputError, match=message):
            load(paths)
