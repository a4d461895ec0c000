"""Hugging Face datasets from every place they can lie: saved folders, copies of hub repositories, the hub."""

from __future__ import annotations

from pathlib import Path

import datasets
import pandas as pd
import pytest

from fedlora.config import DataConfig
from fedlora.data.sources import load_rows
from fedlora.errors import InputError

README = """---
configs:
- config_name: sst2
  data_files:
  - split: train
    path: sst2/train-*
  - split: validation
    path: sst2/validation-*
- config_name: rte
  data_files:
  - split: train
    path: rte/train-*
---
# A benchmark
"""


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def table(label: int, rows: int = 4) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"text {n}" for n in range(rows)], "label": [label] * rows})


def labels(path: Path | str, **settings: object) -> list[int]:
    return load_rows(DataConfig.model_validate({"name": "hf", "path": str(path), **settings}))["label"].to_list()


def save(folder: Path, **splits: int) -> Path:
    tables = {name: datasets.Dataset.from_pandas(table(label)) for name, label in splits.items()}
    datasets.DatasetDict(list(tables.items())).save_to_disk(str(folder))
    return folder


def repository(folder: Path, readme: bool = True) -> Path:
    """A folder laid out like a benchmark on the hub: a folder of Parquet files for every subset."""
    for label, file in enumerate(["sst2/train-0.parquet", "sst2/validation-0.parquet", "rte/train-0.parquet"]):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        table(label).to_parquet(folder / file)
    if readme:
        (folder / "README.md").write_text(README)
    return folder


@pytest.mark.parametrize("splits", [{"train": 1, "test": 0}, {"everything": 1}])
def test_a_saved_dataset_gives_train_or_its_only_split(splits: dict[str, int], tmp_path: Path) -> None:
    assert labels(save(tmp_path / "saved", **splits)) == [1] * 4


def test_another_split_can_be_chosen(tmp_path: Path) -> None:
    assert labels(save(tmp_path / "saved", train=1, test=0), hub_split="test") == [0] * 4
    assert labels(repository(tmp_path / "copy"), subset="sst2", hub_split="validation") == [1] * 4


@pytest.mark.parametrize("settings", [{}, {"hub_split": "middle"}])
def test_a_split_that_is_not_there_names_those_that_are(settings: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the splits left, right .* Set data\.hub_split"):
        labels(save(tmp_path / "saved", left=0, right=1), **settings)


def test_a_single_split_is_not_taken_for_another_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the splits train and none is called 'test'"):
        labels(save(tmp_path / "saved", train=1), hub_split="test")


@pytest.mark.parametrize("readme", [True, False])
def test_a_copy_of_a_hub_repository_is_read_by_subset(readme: bool, tmp_path: Path) -> None:
    folder = repository(tmp_path / "copy", readme)
    assert labels(folder, subset="sst2") == [0] * 4
    assert labels(folder, subset="rte") == [2] * 4
    assert labels(folder / "rte", subset="rte") == [2] * 4


def test_a_subset_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data\.subset 'sst3'\. Did you mean 'sst2'\? It has sst2, rte"):
        labels(repository(tmp_path / "copy"), subset="sst3")


def test_files_without_subsets_serve_any_subset(tmp_path: Path) -> None:
    table(5).to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    table(6).to_json(tmp_path / "test.jsonl", orient="records", lines=True)
    assert labels(tmp_path, subset="main") == [5] * 4
    assert labels(tmp_path, hub_split="test") == [6] * 4


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_one_file_is_read_by_its_suffix(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        table(3).to_csv(path, index=False)
    elif suffix == "parquet":
        table(3).to_parquet(path)
    else:
        table(3).to_json(path, orient="records", lines=True)
    assert labels(path, subset="main") == [3] * 4


def test_a_local_folder_is_read_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bars = datasets.is_progress_bar_enabled()
    labels(repository(tmp_path / "copy"), subset="rte")
    assert capfd.readouterr().err == ""
    assert datasets.is_progress_bar_enabled() == bars


def test_a_path_that_is_no_folder_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, subset: str | None) -> datasets.DatasetDict:
        assert (path, subset) == ("someone/reviews", "film")
        return datasets.DatasetDict({"train": datasets.Dataset.from_pandas(table(1))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert labels("someone/reviews", subset="film") == [1] * 4


def test_a_hub_that_cannot_be_reached_is_explained() -> None:
    with pytest.raises(
        InputError, match=r"data\.path = 'someone/reviews' is not a local file or folder, or a dataset of the hub that"
    ):
        labels("someone/reviews")


def test_a_folder_that_is_no_dataset_is_explained(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is not a Hugging Face dataset, neither .* save_to_disk"):
        labels(tmp_path / "empty")
