from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn import functional
from transformers import AutoTokenizer

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.tasks import Schema, Task
from fedlora.tasks.labels import calibration_error
from tests.fedlora.tasks.helpers import inputs_of, model_of, task_on

TEXTS = ["a lovely film", "dull", "the plot was a very tired and clumsy script with a superb scene"]
OTHERS = ["it was great", "was it good or bad , or neither of the two ?", "no"]
LABELS = Schema(("bad", "good"))


@pytest.fixture(scope="module")
def task(tiny_bert: Path) -> Task:
    return task_on(tiny_bert, "classification")


@pytest.fixture(scope="module")
def tokenizer(task: Task):
    return task.tokenizer


@pytest.fixture(scope="module")
def model(task: Task):
    return model_of(task, LABELS)


def frame(**columns: list) -> pd.DataFrame:
    return pd.DataFrame({"text": TEXTS, "label": ["good", "bad", "bad"], **columns})


def statistics(target: list[int], predicted: list[int], confidence: float = 0.5) -> dict[str, np.ndarray]:
    rows = len(target)
    return {
        "target": np.array(target), "predicted": np.array(predicted), "loss": np.ones(rows),
        "classes": np.full(rows, max(2, 1 + max(*target, *predicted))),
        "confidence": np.full(rows, confidence),
    }  # fmt: skip


def test_the_schema_is_the_sorted_labels_of_all_rows_as_text(task: Task):
    assert task.schema(pd.DataFrame({"label": [3, 1, 3, 2]})) == Schema(("1", "2", "3"))
    assert task.model_overrides(Schema(("1", "2"))) == {
        "num_labels": 2,
        "id2label": {0: "1", 1: "2"},
        "label2id": {"1": 0, "2": 1},
        "pad_token_id": 0,
    }


def test_one_class_is_nothing_to_learn(task: Task):
    with pytest.raises(InputError, match=r"one class only \('good'\).*data\.label.*data\.limit"):
        task.schema(pd.DataFrame({"label": ["good", "good"]}))


def test_a_column_of_texts_is_no_label(task: Task):
    with pytest.raises(InputError, match=r"data\.label.*1001 different values.*task=regression.*task=causal_lm"):
        task.schema(pd.DataFrame({"label": range(1001)}))


def test_rows_are_tokenised_as_the_tokenizer_does(task: Task, tokenizer):
    rows = task.encode(frame(), LABELS, 32)
    for i, text in enumerate(TEXTS):
        assert rows.piece("input_ids", i).tolist() == tokenizer(text)["input_ids"]
    assert rows.fixed["target"].tolist() == [1, 0, 0]
    assert set(rows.ragged) == {"input_ids"}
    assert rows.truncated == 0


def test_long_rows_are_cut(task: Task, tokenizer):
    rows = task.encode(frame(), LABELS, 6)
    assert rows.lengths(np.arange(3)).max() == 6
    assert rows.piece("input_ids", 2).tolist() == tokenizer(TEXTS[2], truncation=True, max_length=6)["input_ids"]


@pytest.mark.parametrize("pairs", [False, True])
def test_only_rows_really_longer_than_allowed_count_as_cut(task: Task, tokenizer, pairs: bool):
    rows = frame(text_pair=OTHERS) if pairs else frame()
    lengths = [len(ids) for ids in tokenizer(TEXTS, OTHERS if pairs else None)["input_ids"]]
    for max_length in range(5, max(lengths) + 2):
        assert task.encode(rows, LABELS, max_length).truncated == sum(n > max_length for n in lengths), max_length


def test_labels_keep_their_numbers_whatever_rows_are_encoded(task: Task):
    rows = task.encode(frame().iloc[:1], Schema(("awful", "bad", "good")), 32)
    assert rows.fixed["target"].tolist() == [2]


def test_a_batch_is_padded_like_the_tokenizer_pads(task: Task, tokenizer):
    batch = task.collate(task.encode(frame(), LABELS, 32), [2, 0])
    expected = tokenizer([TEXTS[2], TEXTS[0]], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert "token_type_ids" not in batch
    assert batch["target"].tolist() == [0, 1]


@pytest.mark.parametrize("max_length", [64, 12, 5])
def test_pairs_have_the_tokenizers_own_token_types(task: Task, tokenizer, max_length: int):
    batch = task.collate(task.encode(frame(text_pair=OTHERS), LABELS, max_length), [0, 1, 2])
    expected = tokenizer(TEXTS, OTHERS, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[key], expected[key]), key


def test_a_tokenizer_without_token_types_gets_none(tiny_gpt2: Path, tmp_path: Path):
    AutoTokenizer.from_pretrained(tiny_gpt2, model_input_names=["input_ids", "attention_mask"]).save_pretrained(
        tmp_path
    )
    task = task_on(tiny_gpt2, "classification", tokenizer=tmp_path)
    rows = task.encode(frame(text_pair=OTHERS), LABELS, 32)
    assert set(rows.ragged) == {"input_ids"}


def test_the_loss_is_transformers_own(task: Task, model):
    batch = task.collate(task.encode(frame(), LABELS, 32), [0, 1, 2])
    expected = model(**inputs_of(batch), labels=batch["target"]).loss
    torch.testing.assert_close(task.loss(model, batch), expected)


def test_the_second_text_of_a_pair_reaches_the_model(task: Task, model):
    losses = []
    for others in (OTHERS, OTHERS[::-1]):
        rows = task.encode(frame(text_pair=others), LABELS, 32)
        losses.append(float(task.loss(model, task.collate(rows, [0, 1, 2]))))
    assert losses[0] != losses[1]


def test_statistics_are_of_every_row(task: Task, model):
    batch = task.collate(task.encode(frame(), LABELS, 32), [0, 1, 2])
    with torch.no_grad():
        scores = model(**inputs_of(batch)).logits
        found = task.statistics(model, batch)
    np.testing.assert_allclose(
        found["loss"], functional.cross_entropy(scores, batch["target"], reduction="none"), rtol=1e-6
    )
    np.testing.assert_array_equal(found["predicted"], scores.argmax(1))
    np.testing.assert_allclose(found["confidence"], scores.softmax(1).amax(1), rtol=1e-6)
    np.testing.assert_array_equal(found["target"], batch["target"])
    assert found["loss"].mean() == pytest.approx(float(task.loss(model, batch)), rel=1e-6)


def test_metrics_are_sklearns(task: Task):
    rng = np.random.default_rng(0)
    target, predicted, loss = rng.integers(0, 3, 50), rng.integers(0, 3, 50), rng.random(50)
    classes = np.full(50, 3)
    values = {"target": target, "predicted": predicted, "loss": loss, "confidence": loss, "classes": classes}
    found = task.metrics(values)
    assert found == pytest.approx(
        {
            "accuracy": accuracy_score(target, predicted),
            "macro_f1": f1_score(target, predicted, average="macro"),
            "mcc": matthews_corrcoef(target, predicted),
            "loss": loss.mean(),
        }
    )


@pytest.mark.parametrize("predicted", [[0, 0], [1, 1], [0, 1]])
def test_metrics_of_a_client_with_one_class_are_numbers(task: Task, predicted: list[int]):
    found = task.metrics(statistics([0, 0], predicted))
    assert all(np.isfinite(value) for value in found.values())
    assert found["accuracy"] == predicted.count(0) / 2


def test_f1_is_of_the_second_of_two_classes(task: Task):
    found = task.metrics(statistics([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]))
    assert found["f1"] == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert task.metrics(statistics([0, 0, 0], [0, 0, 0]))["f1"] == 0.0


def test_calibration_error_is_the_one_computed_by_hand():
    """Bins of width 1/15: 0.62 and 0.65 share [9/15, 10/15), 0.90 is in [13/15, 14/15), 1.0 in the last one."""
    confidence, correct = np.array([0.62, 0.65, 0.90, 1.0]), np.array([True, False, True, True])
    expected = 2 / 4 * abs(0.5 - 0.635) + 1 / 4 * abs(1 - 0.9) + 1 / 4 * 0
    assert calibration_error(confidence, correct) == pytest.approx(expected)


def test_calibration_is_reported_on_demand(task: Task, tiny_bert: Path):
    rows = statistics([0, 1, 1, 1], [0, 1, 1, 0], confidence=0.9)
    assert "ece" not in task.metrics(rows)
    assert task_on(tiny_bert, "classification", calibration=True).metrics(rows)["ece"] == pytest.approx(0.9 - 0.75)


def test_zero_shot_answers_the_majority_class_of_the_training_rows(task: Task):
    rows = EncodedRows.from_lists({"input_ids": [[1]] * 8}, {"target": [0, 1, 1, 1, 2, 0, 1, 3]})
    found = task.zero_shot(rows, np.arange(5), np.array([5, 6, 7]))
    assert found is not None
    np.testing.assert_array_equal(found["predicted"], [1, 1, 1])
    np.testing.assert_array_equal(found["target"], [0, 1, 3])
    np.testing.assert_allclose(np.exp(-found["loss"]), np.array([2, 4, 1]) / 9)  # counts + 1, of four classes
    np.testing.assert_allclose(found["confidence"], 4 / 9)
    assert task.metrics(found)["accuracy"] == pytest.approx(1 / 3)
