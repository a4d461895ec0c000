from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.tasks import Schema, Task
from fedlora.tasks.choices import choices_of, right_choice
from tests.fedlora.tasks.helpers import inputs_of, model_of, task_on

QUESTIONS = ["what is 3 plus 4?", "name a lovely film", "is the plot dull?"]
CHOICES = [
    ["7", "a lovely 12 of course"],
    ["none", "the actor", "a great and moving one"],
    ["yes", "no", "a bit", "it is"],
]
RIGHT = [0, 2, 1]


@pytest.fixture(scope="module")
def task(tiny_llama: Path) -> Task:
    return task_on(tiny_llama, "multiple_choice")


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    return model_of(task, Schema())


def frame(labels: list | None = None, choices: list | None = None) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": QUESTIONS,
            "choices": pd.Series(CHOICES if choices is None else choices, dtype=object),
            "label": RIGHT if labels is None else labels,
        }
    )


@pytest.fixture(scope="module")
def rows(task: Task) -> EncodedRows:
    return task.encode(frame(), Schema(), 64)


def likelihood(task: Task, model: nn.Module, question: str, choice: str) -> torch.Tensor:
    """Log-likelihood of every token of a choice after its question, alone in its batch."""
    head = task.tokenizer(question)["input_ids"]
    tail = task.tokenizer(choice, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
    return -functional.cross_entropy(logits, torch.tensor(tail), reduction="none")


def test_every_choice_stands_after_its_question(task: Task, rows: EncodedRows):
    batch = task.collate(rows, [1, 0])
    assert batch["input_ids"].shape[:2] == (2, 3)
    assert batch["target"].tolist() == [2, 0]
    for place, row in enumerate([1, 0]):
        for number, choice in enumerate(CHOICES[row]):
            head = task.tokenizer(QUESTIONS[row])["input_ids"]
            tail = task.tokenizer(choice, add_special_tokens=False)["input_ids"]
            real = batch["attention_mask"][place, number] == 1
            assert batch["input_ids"][place, number][real].tolist() == head + tail
            assert batch["labels"][place, number][real].tolist() == [-100] * len(head) + tail
    assert batch["attention_mask"][1, 2].sum() == 0  # the second row has two choices
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_the_separator_stands_between_question_and_choice(tiny_llama: Path, task: Task, rows: EncodedRows):
    other = task_on(tiny_llama, "multiple_choice", separator=" answer : ")
    batch = other.collate(other.encode(frame(), Schema(), 64), [0])
    labels = batch["labels"][0, 0]
    assert task.tokenizer.decode(labels[labels != -100]) == "answer : 7"


def test_training_learns_the_right_choice_only(task: Task, model: nn.Module, rows: EncodedRows):
    batch = task.collate(rows, [0, 1, 2])
    found = torch.cat([likelihood(task, model, q, c[r]) for q, c, r in zip(QUESTIONS, CHOICES, RIGHT, strict=True)])
    assert float(task.loss(model, batch)) == pytest.approx(-float(found.mean()), rel=1e-5)
    assert task.weight(batch) == len(found)


def test_the_answer_is_the_most_likely_choice_whatever_it_is_batched_with(
    task: Task, model: nn.Module, rows: EncodedRows
):
    with torch.no_grad():
        found = task.statistics(model, task.collate(rows, [0, 1, 2]))
    for row, (question, choices) in enumerate(zip(QUESTIONS, CHOICES, strict=True)):
        score = [float(likelihood(task, model, question, choice).sum()) for choice in choices]
        per_character = [s / len(choice) for s, choice in zip(score, choices, strict=True)]
        assert found["loss"][row] == pytest.approx(-score[RIGHT[row]], rel=1e-5)
        assert found["correct"][row] == (int(np.argmax(score)) == RIGHT[row])
        assert found["correct_norm"][row] == (int(np.argmax(per_character)) == RIGHT[row])


def test_the_two_accuracies_differ_where_length_decides(task: Task, model: nn.Module):
    """Each choice is declared right in turn: exactly one wins by sum and one by character, and not the same."""
    question = pd.concat([frame([0] * 3, [CHOICES[0]] * 3)] * 2).head(2).reset_index(drop=True)
    question["text"] = QUESTIONS[0]
    question["label"] = [0, 1]
    encoded = task.encode(question, Schema(), 64)
    found = task.statistics(model, task.collate(encoded, [0, 1]))
    assert found["correct"].tolist() == [True, False]  # the short one
    assert found["correct_norm"].sum() == 1


def test_metrics_are_means_over_rows_and_the_loss_is_per_token(task: Task):
    found = task.metrics(
        {
            "loss": np.array([2.0, 10.0]), "tokens": np.array([1, 5]),
            "correct": np.array([True, False]), "correct_norm": np.array([True, True]),
        }
    )  # fmt: skip
    assert found == {"accuracy": 0.5, "accuracy_norm": 1.0, "loss": 2.0}


def test_choices_go_through_the_chat_template_when_asked(tiny_llama: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, eos_token="[SEP]")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }}[SEP]{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    task = task_on(tiny_llama, "multiple_choice", tokenizer=tmp_path, chat="auto")
    batch = task.collate(task.encode(frame(), Schema(), 64), [0])
    labels = batch["labels"][0, 1]
    assert task.tokenizer.decode(labels[labels != -100]) == "a lovely 12 of course [SEP]"


def test_a_long_question_is_cut_from_its_left(task: Task, rows: EncodedRows):
    cut = task.encode(frame(), Schema(), 6)
    batch, full = task.collate(cut, [0]), task.collate(rows, [0])
    for choice in range(2):
        kept = batch["labels"][0, choice]
        assert kept[kept != -100].tolist() == full["labels"][0, choice][full["labels"][0, choice] != -100][:5].tolist()
    assert cut.truncated == 3  # rows, however many of their choices are cut


@pytest.mark.parametrize(
    ("label", "choices", "keys", "expected"),
    [
        (1, ["x", "y"], [], ("number", 1)),
        (1.0, ["x", "y"], [], ("number", 1)),
        (np.int64(0), ["x", "y"], [], ("number", 0)),
        ("1", ["x", "y"], [], ("number", 1)),
        ("B", ["x", "y"], [], ("letter", 1)),
        ("b", ["x", "y"], [], ("letter", 1)),
        ("y", ["x", "y"], [], ("text", 1)),
        ("2", ["1", "2"], [], ("text", 1)),  # the text of a choice comes before its number
        (0, ["1", "0"], [], ("number", 0)),  # but a number is no text
        ("1", ["x", "y"], ["1", "2"], ("text", 0)),  # the data's own keys come first
        (2, ["x", "y"], [], ("number", None)),
        (-1, ["x", "y"], [], ("letter", None)),
        ("C", ["x", "y"], [], ("letter", None)),
        ("", ["x", "y"], [], ("letter", None)),
    ],
)
def test_labels_are_keys_texts_letters_or_numbers(label: object, choices: list, keys: list, expected: tuple):
    assert right_choice(label, choices, keys) == expected


def test_choices_come_as_lists_arrays_or_as_arc_has_them():
    assert choices_of(["x", 2]) == (["x", "2"], [])
    assert choices_of(np.array(["x", "y"], dtype=object)) == (["x", "y"], [])
    assert choices_of({"text": np.array(["x", "y"]), "label": np.array(["A", "B"])}) == (["x", "y"], ["A", "B"])
    assert choices_of("xy") == ([], [])


@pytest.mark.parametrize("labels", [["7", "C", "no"], ["A", "C", "B"], ["0", "2", "1"]])
def test_rows_are_the_same_however_labels_are_written(task: Task, rows: EncodedRows, labels: list):
    np.testing.assert_array_equal(task.encode(frame(labels), Schema(), 64).fixed["target"], rows.fixed["target"])


@pytest.mark.parametrize("label", ["perhaps", "E", 4, -1])
def test_a_label_that_is_no_choice_is_refused_with_its_row(task: Task, label: object):
    with pytest.raises(InputError, match=r"Row 3: data\.label = .* is none of its 4 choices"):
        task.schema(frame(pd.Series([0, 1, label], dtype=object).tolist()))


def test_letters_beside_numbers_are_refused(task: Task):
    with pytest.raises(InputError, match="letters in some rows and numbers in others"):
        task.schema(frame(["A", "1", "B"]))


@pytest.mark.parametrize("choices", [["only one"], [], "text", ["x", " "], None])
def test_a_row_without_two_choices_is_refused(task: Task, choices: object):
    with pytest.raises(InputError, match=r"Row 2: data\.choices must hold at least two texts"):
        task.schema(frame(choices=[CHOICES[0], choices, CHOICES[2]]))


def test_data_without_choices_is_refused(task: Task):
    with pytest.raises(InputError, match=r"set data\.choices"):
        task.schema(frame().drop(columns="choices"))


def test_an_encoder_is_refused(tiny_bert: Path):
    with pytest.raises(InputError, match="task=multiple_choice needs a language model"):
        task_on(tiny_bert, "multiple_choice").schema(frame())


def test_a_sample_names_the_right_choice_and_the_most_likely_one(task: Task, model: nn.Module, rows: EncodedRows):
    found = task.sample(model, rows, 1)
    scores = [float(likelihood(task, model, QUESTIONS[1], choice).sum()) for choice in CHOICES[1]]
    assert found == {
        "prompt": QUESTIONS[1], "reference": CHOICES[1][RIGHT[1]], "answer": CHOICES[1][int(np.argmax(scores))]
    }  # fmt: skip


def test_nothing_answers_without_a_model(task: Task, rows: EncodedRows):
    assert task.zero_shot(rows, np.array([0]), np.array([1])) is None
    assert set(inputs_of(task.collate(rows, [0]))) == {"input_ids", "attention_mask"}
