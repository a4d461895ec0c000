from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn import functional

from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.tasks import Schema, build_task, collate
from tests.fedlora.helpers import first_batch, logits, random_state

TASK = build_task("classification")
TEXTS = ["a lovely film", "dull", "the plot was a very tired and clumsy script with a superb scene"]
OTHERS = ["it was great", "was it good or bad , or neither of the two ?", "no"]
LABELS = Schema(("bad", "good"))


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def gpt_tokenizer(tiny_gpt2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_gpt2)


def frame(**columns: list) -> pd.DataFrame:
    return pd.DataFrame({"text": TEXTS, "label": ["good", "bad", "bad"], **columns})


def test_the_schema_is_the_sorted_labels_of_all_rows_as_text():
    assert TASK.schema(pd.DataFrame({"label": [3, 1, 3, 2]})) == Schema(("1", "2", "3"))


def test_one_class_is_nothing_to_learn():
    with pytest.raises(InputError, match=r"one class only \('good'\).*data\.label"):
        TASK.schema(pd.DataFrame({"label": ["good", "good"]}))


def test_a_column_of_texts_is_no_label():
    with pytest.raises(InputError, match=r"data\.label.*1001 different values"):
        TASK.schema(pd.DataFrame({"label": range(1001)}))


def test_rows_are_tokenised_as_the_tokenizer_does(tokenizer):
    rows = TASK.encode(tokenizer, frame(), LABELS, 32)
    for i, text in enumerate(TEXTS):
        assert rows.ids(i).tolist() == tokenizer(text)["input_ids"]
    assert rows.targets.tolist() == [1, 0, 0]
    assert rows.segments is None
    assert rows.truncated == 0


def test_long_rows_are_cut_and_counted(tokenizer):
    rows = TASK.encode(tokenizer, frame(), LABELS, 6)
    assert max(len(rows.ids(i)) for i in range(3)) == 6
    assert rows.truncated == 1
    assert rows.ids(2).tolist() == tokenizer(TEXTS[2], truncation=True, max_length=6)["input_ids"]


def test_labels_keep_their_numbers_whatever_rows_are_encoded(tokenizer):
    rows = TASK.encode(tokenizer, frame().iloc[:1], Schema(("awful", "bad", "good")), 32)
    assert rows.targets.tolist() == [2]


def test_a_batch_is_padded_like_the_tokenizer_pads(tokenizer):
    batch = collate(TASK.encode(tokenizer, frame(), LABELS, 32), [2, 0], tokenizer.pad_token_id)
    expected = tokenizer([TEXTS[2], TEXTS[0]], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert "token_type_ids" not in batch
    assert batch["target"].tolist() == [0, 1]


@pytest.mark.parametrize("max_length", [64, 12, 5])
def test_pairs_have_the_tokenizers_own_token_types(tokenizer, max_length: int):
    rows = TASK.encode(tokenizer, frame(text_pair=OTHERS), LABELS, max_length)
    batch = collate(rows, [0, 1, 2], tokenizer.pad_token_id)
    expected = tokenizer(TEXTS, OTHERS, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[key], expected[key]), key


def test_a_tokenizer_without_token_types_gets_none(gpt_tokenizer, monkeypatch):
    monkeypatch.setattr(gpt_tokenizer, "model_input_names", ["input_ids", "attention_mask"])
    rows = TASK.encode(gpt_tokenizer, frame(text_pair=OTHERS), LABELS, 32)
    assert rows.segments is None


def test_the_loss_is_transformers_own(tiny):
    federation = Federation(tiny())
    model, batch = federation.build_model(), first_batch(federation)
    model.load(random_state(model, model.shared))
    inputs = {key: value for key, value in batch.items() if key != "target"}
    expected = model.module(**inputs, labels=batch["target"]).loss
    torch.testing.assert_close(TASK.loss(model.module, batch), expected)


def test_the_second_text_of_a_pair_reaches_the_model(tiny, tokenizer):
    federation = Federation(tiny())
    model = federation.build_model()
    model.load(random_state(model, model.shared))
    losses = []
    for others in (OTHERS, OTHERS[::-1]):
        rows = TASK.encode(tokenizer, frame(text_pair=others), LABELS, 32)
        losses.append(float(TASK.loss(model.module, collate(rows, [0, 1, 2], 0)).detach()))
    assert losses[0] != losses[1]


def test_statistics_are_of_every_row(tiny):
    federation = Federation(tiny())
    model, batch = federation.build_model(), first_batch(federation)
    model.load(random_state(model, model.shared))
    scores = logits(model.module, batch)
    with torch.no_grad():
        found = TASK.statistics(model.module, batch)
    np.testing.assert_allclose(
        found["loss"], functional.cross_entropy(scores, batch["target"], reduction="none"), rtol=1e-6
    )
    np.testing.assert_array_equal(found["predicted"], scores.argmax(1))
    np.testing.assert_array_equal(found["target"], batch["target"])
    assert found["loss"].mean() == pytest.approx(float(TASK.loss(model.module, batch).detach()), rel=1e-6)


def test_metrics_are_sklearns():
    rng = np.random.default_rng(0)
    target, predicted, loss = rng.integers(0, 3, 50), rng.integers(0, 3, 50), rng.random(50)
    assert TASK.metrics({"target": target, "predicted": predicted, "loss": loss}) == pytest.approx(
        {
            "accuracy": accuracy_score(target, predicted),
            "macro_f1": f1_score(target, predicted, average="macro"),
            "mcc": matthews_corrcoef(target, predicted),
            "loss": loss.mean(),
        }
    )


@pytest.mark.parametrize("predicted", [[0, 0], [1, 1], [0, 1]])
def test_metrics_of_a_client_with_one_class_are_numbers(predicted: list[int]):
    found = TASK.metrics({"target": np.zeros(2, int), "predicted": np.array(predicted), "loss": np.ones(2)})
    assert all(np.isfinite(value) for value in found.values())
    assert found["accuracy"] == predicted.count(0) / 2


def test_zero_shot_answers_the_majority_class_of_the_training_rows():
    train, targets = np.array([0, 1, 1, 1, 2]), np.array([0, 1, 3])
    found = TASK.zero_shot(train, targets)
    np.testing.assert_array_equal(found["predicted"], [1, 1, 1])
    np.testing.assert_allclose(np.exp(-found["loss"]), np.array([2, 4, 1]) / 9)  # counts + 1, of four classes
