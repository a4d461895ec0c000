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
from simulations.report.find import find
from simulations.report.load import load


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
    assert find([sweep]) == find([sweep / "*"]) == find([str(sweep / "**" / "*-[12]")])
    assert len(find([sweep, sweep / "fedit-1"])) == 10


def test_numbers_are_those_of_the_run_folders(sweep: Path) -> None:
    (section,) = load([sweep])
    ledgers = {path.parent: pd.read_parquet(path) for path in sweep.glob("*/ledger.parquet")}
    for _, row in section.runs.iterrows():
        summary = json.loads((Path(row["folder"]) / "summary.json").read_text())
        assert row["score"] == summary["final"]["metrics"]["seen_accuracy"]
        assert row["clients_worst_decile"] == summary["final"]["clients"]["worst_decile"]
        ledger = ledgers[Path(row["folder"])]
        assert (row["bytes"], row["transport"]) == (ledger["message"].sum(), ledger["transport"].sum())
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


def test_of_a_tuned_sweep_the_chosen_runs_count_under_the_names_of_their_methods(
    tuned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fedlora.notices"):
        (section,) = load([tuned])
    methods = json.loads((tuned / "comparison.json").read_text())["methods"]
    for method in methods:
        own = section.runs[section.runs["method"] == method["label"]]
        assert [Path(folder).name for folder in own.sort_values("seed")["folder"]] == method["folders"]
    assert len(section.runs) == 3 * 2
    assert section.trials == len(find([tuned])) - len(section.runs) == 3
    assert "Left out: 3 trials that chose client.lr" in caplog.text


def test_a_tuned_run_and_one_that_is_not_are_told_apart(tuned: Path, copy: Callable[..., Path]) -> None:
    (section,) = load([tuned, copy("ffa-1", "untuned", rounds=1, eval__every=1)])
    names = {name.split(" ")[0]: name for name in section.runs["method"] if name.startswith("ffa ")}
    assert section.runs["method"].str.startswith("ffa").sum() == 3
    assert "lr=" in names["ffa"]


def test_trials_of_the_choice_are_no_results(tuned: Path) -> None:
    final = {name for m in json.loads((tuned / "comparison.json").read_text())["methods"] for name in m["folders"]}
    trial = next(folder for folder in find([tuned]) if folder.name not in final)
    with pytest.raises(InputError, match="Give the folder of their sweep"):
        load([trial])


def test_an_older_or_damaged_tuned_sweep_is_to_be_repeated(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "older")
    file = tmp_path / "older" / "comparison.json"
    document = json.loads(file.read_text())
    for method in document["methods"]:
        del method["folders"]
    for text in (json.dumps(document), "{", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(InputError, match="Repeat the command of the sweep"):
            load([tmp_path / "older"])


def test_values_of_clients_are_those_of_the_run_folders_and_older_runs_have_none(
    sweep: Path, copy: Callable[..., Path]
) -> None:
    (section,) = load([sweep])
    means = section.clients.groupby(["method", "seed"])["value"].mean()
    for _, row in section.runs.iterrows():
        assert means[row["method"], row["seed"]] == pytest.approx(row["clients_mean"])
    older = copy("fedit-1", "older")
    (older / "clients.parquet").unlink()
    copy("ffa-1", "newer")
    assert set(load([older.parent])[0].clients["method"]) == {"ffa"}
    assert load([older])[0].clients.empty


@pytest.mark.parametrize(
    ("file", "text"),
    [(file, text) for file in ("summary.json", "rounds.jsonl") for text in ("{", "[]", "{}")]
    + [("config.yaml", "{"), ("config.yaml", "[]"), ("clients.parquet", "no table")],
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
