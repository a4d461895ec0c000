from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fedlora.errors import InputError
from fedlora.tasks import Schema, Task
from tests.fedlora.tasks.helpers import inputs_of, model_of, task_on

WORDS = [["angela", "scott", "visited", "unbelievable", "paris"], ["nobody", "came"], ["dr.", "who", "!"]]
TAGS = [["B-PER", "I-PER", "O", "O", "B-LOC"], ["O", "O"], ["B-PER", "I-PER", "O"]]
SCHEMA = Schema(("B-LOC", "B-PER", "I-PER", "O"))


@pytest.fixture(scope="module")
def task(tiny_bert: Path) -> Task:
    return task_on(tiny_bert, "token_classification")


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    return model_of(task, SCHEMA)


def frame(words: object = WORDS, tags: object = TAGS) -> pd.DataFrame:
    return pd.DataFrame({"text": pd.Series(words, dtype=object), "label": pd.Series(tags, dtype=object)})


def joined(rows: list[list[str]]) -> list[str]:
    return [" ".join(row) for row in rows]


def learned(task: Task, rows, row: int) -> list[tuple[str, str]]:
    """The tokens of a row that carry a tag, and that tag."""
    tokens = task.tokenizer.convert_ids_to_tokens(rows.piece("input_ids", row).tolist())
    labels = rows.piece("labels", row)
    return [(token, SCHEMA.labels[tag]) for token, tag in zip(tokens, labels, strict=True) if tag != -100]


def test_the_schema_is_the_sorted_tags_of_all_rows(task: Task):
    assert task.schema(frame()) == SCHEMA


@pytest.mark.parametrize(
    "rows",
    [frame(), frame(joined(WORDS), joined(TAGS)), frame([np.array(w) for w in WORDS], [np.array(t) for t in TAGS])],
)
def test_words_and_tags_are_lists_arrays_or_texts(task: Task, rows: pd.DataFrame):
    encoded = task.encode(rows, task.schema(rows), 32)
    assert learned(task, encoded, 0) == list(
        zip(["angela", "scott", "visited", "unbelievable", "paris"], TAGS[0], strict=True)
    )


def test_a_word_of_several_tokens_is_learned_at_its_first(task: Task):
    encoded = task.encode(frame([["merkelization", "won"]], [["B-PER", "O"]]), SCHEMA, 32)
    tokens = task.tokenizer.tokenize("merkelization")
    assert len(tokens) > 1
    assert learned(task, encoded, 0) == [(tokens[0], "B-PER"), ("won", "O")]


def test_a_word_split_by_the_tokenizer_at_punctuation_is_one_word(task: Task):
    assert learned(task, task.encode(frame(), SCHEMA, 32), 2) == [("dr", "B-PER"), ("who", "I-PER"), ("!", "O")]


def test_rows_are_tokenised_as_text(task: Task):
    encoded = task.encode(frame(), SCHEMA, 32)
    for row, text in enumerate(joined(WORDS)):
        assert encoded.piece("input_ids", row).tolist() == task.tokenizer(text)["input_ids"]


def test_words_beyond_the_longest_row_are_not_learned_and_their_rows_are_counted(task: Task):
    encoded = task.encode(frame(), SCHEMA, 5)
    assert learned(task, encoded, 0) == [("angela", "B-PER"), ("scott", "I-PER"), ("visited", "O")]
    lengths = [len(ids) for ids in task.tokenizer(joined(WORDS))["input_ids"]]
    for max_length in range(4, 10):
        assert task.encode(frame(), SCHEMA, max_length).truncated == sum(n > max_length for n in lengths)


@pytest.mark.parametrize(
    ("words", "tags"),
    [(["a", "b"], ["O"]), ("a b", "O O O"), ([], []), (["a"], [["O", "O"]][0])],
)
def test_a_row_without_a_tag_for_every_word_is_refused(task: Task, words: object, tags: object):
    with pytest.raises(InputError, match=r"Row 2 has \d words \(data\.text\) and \d tags \(data\.label\)"):
        task.schema(frame([["x"], words], [["O"], tags]))


def test_numbers_become_tags_by_their_names(tiny_bert: Path):
    task = task_on(tiny_bert, "token_classification", tags=["O", "B-PER", "I-PER"])
    rows = frame([["angela", "scott"], ["hello"]], [[1, 2], ["O"]])
    assert task.schema(rows) == Schema(("O", "B-PER", "I-PER"))
    encoded = task.encode(rows, task.schema(rows), 16)
    assert encoded.ragged["labels"].tolist() == [-100, 1, 2, -100, -100, 0, -100]


@pytest.mark.parametrize("tag", [3, "B-LOC", -1])
def test_a_tag_without_a_name_is_refused_with_its_row(tiny_bert: Path, tag: object):
    task = task_on(tiny_bert, "token_classification", tags=["O", "B-PER", "I-PER"])
    with pytest.raises(InputError, match=r"Row 2 has the tag .* not one of the 3 of task\.tags"):
        task.schema(frame([["a"], ["b"]], [[0], [tag]]))


def test_the_loss_is_transformers_own(task: Task, model: nn.Module):
    batch = task.collate(task.encode(frame(), SCHEMA, 32), [0, 1, 2])
    expected = model(**inputs_of(batch), labels=batch["labels"]).loss
    torch.testing.assert_close(task.loss(model, batch), expected)
    found = task.statistics(model, batch)
    assert found["loss"].sum() / task.weight(batch) == pytest.approx(float(expected), rel=1e-6)
    assert found["words"].tolist() == [5, 2, 3]


def test_statistics_count_the_entities_of_every_row(task: Task, model: nn.Module):
    """A model that is always right, then one that calls every word a place."""
    batch = task.collate(task.encode(frame(), SCHEMA, 32), [0, 1, 2])
    right = nn.functional.one_hot(batch["labels"].clamp(min=0), 4).float()
    places = torch.zeros_like(right)
    places[..., 0] = 1.0
    found, others = (task.statistics(Says(logits, model), batch) for logits in (right, places))
    assert found["counts"][..., 0].tolist() == [[2, 2, 2], [0, 0, 0], [1, 1, 1]]
    assert task.metrics(found)["f1"] == task.metrics(found)["token_accuracy"] == 1.0
    assert others["counts"][..., 0].tolist() == [[1, 5, 2], [0, 2, 0], [0, 3, 1]]
    assert task.metrics(others)["precision"] == pytest.approx(1 / 10)
    assert task.metrics(others)["recall"] == pytest.approx(1 / 3)
    assert task.metrics(others)["token_accuracy"] == pytest.approx(1 / 10)


class Says(nn.Module):
    """A model that answers with given logits."""

    def __init__(self, logits: torch.Tensor, like: nn.Module) -> None:
        super().__init__()
        self.answer, self.config = logits, like.config

    def forward(self, **_: torch.Tensor):
        return type("Output", (), {"logits": self.answer})


def test_tags_without_a_scheme_are_scored_one_by_one(task: Task):
    rows = frame([["it", "rains"], ["go"]], [["PRON", "VERB"], ["VERB"]])
    schema = task.schema(rows)
    batch = task.collate(task.encode(rows, schema, 8), [0, 1])
    verbs = torch.zeros(2, batch["labels"].shape[1], 2)
    verbs[..., 1] = 1.0
    found = task.statistics(Says(verbs, model_of(task, schema)), batch)
    assert found["counts"].shape == (2, 3, 2)
    assert task.metrics(found)["f1"] == pytest.approx((0.0 + 0.8) / 2)  # of VERB: precision 2/3, recall 1


def test_the_exported_model_knows_the_names_of_its_tags(model: nn.Module):
    assert model.config.id2label == dict(enumerate(SCHEMA.labels))


def test_decoders_see_words_with_their_spaces(tiny_gpt2: Path):
    task = task_on(tiny_gpt2, "token_classification")
    batch = task.collate(task.encode(frame(), SCHEMA, 32), [0, 1, 2])
    found = task.statistics(model_of(task, SCHEMA), batch)
    assert np.isfinite(found["loss"]).all()
