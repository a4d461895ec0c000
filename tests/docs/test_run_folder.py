"""The page on the run folder names every file that a run leaves, and every field of every file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from simulations.cli import main
from tests.docs.commands import ROOT


@pytest.fixture(scope="module")
def sweep(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned sweep of a method that leaves all kinds of files."""
    folder = tmp_path_factory.mktemp("sweep")
    tuned = ["client.lr=1e-3,1e-2", "seed=1", "+tuning.setting=client.lr", "+tuning.seeds=[1,2]", f"run_dir={folder}"]
    settings = ["method=fed_sb,fedex", "adapter.rank=2", "rounds=1", "eval.target=0.1", "eval.personalise=true"]
    assert main(["simulate", "-m", "--merged", *tiny_overrides, *settings, *tuned]) == 0
    return folder


def explained(section: str = "") -> set[str]:
    """The words in code of the page, or of one of its sections."""
    text = (ROOT / "docs" / "run-folder.md").read_text()
    if section:
        text = text.partition(f"# {section}\n")[2].partition("\n#")[0]
    return {word for line in text.splitlines() for word in re.findall(r"`([^`]+)`", line)}


def test_every_file_is_explained(sweep: Path) -> None:
    left = {f"{path.name}/" if path.is_dir() else path.name for run in sweep.glob("[0-9]") for path in run.iterdir()}
    left |= {path.name for path in [*sweep.iterdir(), *sweep.glob("*/adapter/*")] if path.is_file()}
    assert left - explained() == set()
    assert {"base_correction.safetensors", "clients/", "merged/", "comparison.json"} <= left


@pytest.mark.parametrize("file", ["rounds.jsonl", "summary.json", "ledger.parquet", "trials.jsonl", "comparison.json"])
def test_every_field_is_explained(file: str, sweep: Path) -> None:
    assert fields(next(sweep.rglob(file))) - explained(file) == set()


def fields(path: Path) -> set[str]:
    """Names of columns, or of fields; of what has the same names everywhere, also those inside."""
    if path.suffix == ".parquet":
        return set(pd.read_parquet(path).columns)
    text = path.read_text()
    found = json.loads(text.splitlines()[0]) if path.suffix == ".jsonl" else json.loads(text)
    names = set(found)
    for value in found.values():
        for each in value if isinstance(value, list) else [value]:
            names |= set(each) if isinstance(each, dict) else set()
    return names - set(found.get("metrics", ())) - set(found.get("versions", ()))
