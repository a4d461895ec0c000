from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.errors import InputError
from fedlora.tasks import Task, build_task, collate
from fedlora.tokens import TokenisedRows


def test_a_task_is_found_by_its_name():
    assert build_task("classification").name == "classification"
    assert build_task("causal_lm").name == "causal_lm"


def test_an_unknown_task_names_the_nearest_one():
    with pytest.raises(InputError, match="Did you mean 'classification'"):
        build_task("clasification")


def test_a_users_task_is_loaded_from_its_file(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from fedlora.tasks.classification import Classification\nclass Mine(Classification):\n    name = 'mine'\n"
    )
    task = build_task(f"{file}:Mine")
    assert task.name == "mine"
    assert isinstance(task, Task)


def test_collate_pads_to_the_longest_row_and_masks_the_padding():
    rows = TokenisedRows.from_lists([[5, 6, 7], [8], [9, 9]], [10, 20, 30])
    batch = collate(rows, [1, 2], pad_id=99)
    assert batch["input_ids"].tolist() == [[8, 99], [9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["target"].tolist() == [20, 30]
    assert {value.dtype for value in batch.values()} == {torch.long}


def test_collate_marks_the_second_text_of_a_pair_up_to_the_padding():
    rows = TokenisedRows.from_lists([[1, 2, 3], [1, 2, 3, 4]], [0, 0], segments=[1, 4])
    assert collate(rows, [0, 1], 0)["token_type_ids"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
