from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.tasks import Task, collate
from tests.fedlora.tasks.helpers import task_on


@pytest.mark.parametrize("name", ["classification", "causal_lm"])
def test_a_task_is_found_by_its_name(tiny_bert: Path, name: str):
    assert task_on(tiny_bert, name).name == name


def test_an_unknown_task_names_the_nearest_one(tiny_bert: Path):
    with pytest.raises(InputError, match="Did you mean 'classification'"):
        task_on(tiny_bert, "clasification")


def test_a_setting_that_the_task_does_not_have_is_refused_with_the_nearest_one(tiny_bert: Path):
    with pytest.raises(InputError, match=r"'task\.calibation'\. Did you mean 'calibration'"):
        task_on(tiny_bert, "classification", calibation=True)


def test_the_main_metric_is_the_tasks_own_unless_one_is_named(tiny_bert: Path):
    assert task_on(tiny_bert, "classification").main_metric == "accuracy"
    assert task_on(tiny_bert, "classification", metric="mcc").main_metric == "mcc"


def test_a_users_task_is_loaded_from_its_file(tiny_bert: Path, tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from fedlora.tasks.classification import Classification\nclass Mine(Classification):\n    name = 'mine'\n"
    )
    task = task_on(tiny_bert, f"{file}:Mine")
    assert task.name == "mine"
    assert isinstance(task, Task)


def test_a_users_file_must_name_a_task(tiny_bert: Path, tmp_path: Path):
    file = tmp_path / "other.py"
    file.write_text("class Other:\n    pass\n")
    with pytest.raises(InputError, match=r"subclass fedlora\.tasks\.Task"):
        task_on(tiny_bert, f"{file}:Other")


def test_the_key_of_encoded_rows_follows_the_settings_but_not_the_metric(tiny_bert: Path, tiny_llama: Path):
    def key(name: str = "causal_lm", **settings: object) -> str:
        return task_on(tiny_llama, name, **settings).encoding_key

    assert key() == key(metric="loss")
    assert len({key(), key(chat=False), key("classification")}) == 3


def test_collate_pads_to_the_longest_row_and_masks_the_padding():
    rows = EncodedRows.from_lists({"input_ids": [[5, 6, 7], [8], [9, 9]]}, {"target": [10, 20, 30]})
    batch = collate(rows, [1, 2], pad_id=99)
    assert batch["input_ids"].tolist() == [[8, 99], [9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["target"].tolist() == [20, 30]
    assert {value.dtype for value in batch.values()} == {torch.long}


def test_collate_fills_labels_with_the_ignored_one_and_token_types_with_zero():
    rows = EncodedRows.from_lists(
        {"input_ids": [[1, 2, 3], [1]], "labels": [[-100, 2, 3], [1]], "token_type_ids": [[0, 1, 1], [1]]}, {}
    )
    batch = collate(rows, np.array([0, 1]), pad_id=7)
    assert batch["labels"].tolist() == [[-100, 2, 3], [1, -100, -100]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_collate_of_rows_without_tokens_is_their_arrays_alone():
    pixels = np.arange(24, dtype=np.uint8).reshape(3, 2, 2, 2)
    batch = collate(EncodedRows.from_arrays(pixels=pixels, target=[4, 5, 6]), [2, 0], pad_id=0)
    assert set(batch) == {"pixels", "target"}
    np.testing.assert_array_equal(batch["pixels"], pixels[[2, 0]])
    assert batch["target"].tolist() == [6, 4]


def test_a_batch_takes_the_padding_token_of_the_backbone(tiny_bert: Path):
    task = task_on(tiny_bert, "classification")
    rows = EncodedRows.from_lists({"input_ids": [[5, 6], [8]]}, {})
    assert task.collate(rows, [0, 1])["input_ids"].tolist() == [[5, 6], [8, task.tokenizer.pad_token_id]]
    assert task.weight(task.collate(rows, [0, 1])) == 2
