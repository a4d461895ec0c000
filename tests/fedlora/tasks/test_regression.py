from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from fedlora.errors import InputError
from fedlora.tasks import Schema, Task
from tests.fedlora.tasks.helpers import inputs_of, model_of, task_on

TEXTS = ["a lovely film", "dull", "the plot was a very tired and clumsy script"]
SCORES = [4.5, 0.0, 1.25]


@pytest.fixture(scope="module")
def task(tiny_bert: Path) -> Task:
    return task_on(tiny_bert, "regression")


def frame(labels: list = SCORES, **columns: list) -> pd.DataFrame:
    return pd.DataFrame({"text": TEXTS, "label": labels, **columns})


@pytest.mark.parametrize("labels", [SCORES, ["4.5", "0", "1.25"], [4, 0, 1]])
def test_labels_are_numbers_however_they_are_written(task: Task, labels: list):
    assert task.schema(frame(labels)) == Schema()
    target = task.encode(frame(labels), Schema(), 32).fixed["target"]
    assert target.dtype == np.float32
    np.testing.assert_array_equal(target, np.array(labels, dtype=np.float32))


@pytest.mark.parametrize("bad", ["good", "", None, float("nan"), float("inf"), "1e99"])
def test_a_label_that_is_no_finite_number_is_refused_with_its_row(task: Task, bad: object):
    labels = pd.DataFrame({"label": pd.Series([1.0, bad, 2.0], dtype=object)})
    with pytest.raises(InputError, match=r"1 of 3 labels are no finite numbers.*row 2.*task=classification"):
        task.schema(labels)


def test_the_loss_is_transformers_own_mean_squared_error(task: Task):
    model = model_of(task, Schema())
    batch = task.collate(task.encode(frame(), Schema(), 32), [0, 1, 2])
    expected = model(**inputs_of(batch), labels=batch["target"]).loss
    torch.testing.assert_close(task.loss(model, batch), expected)
    found = task.statistics(model, batch)
    assert found["loss"].mean() == pytest.approx(float(expected), rel=1e-6)
    assert task.metrics(found)["mse"] == pytest.approx(float(expected), rel=1e-6)


def test_the_second_text_of_a_pair_reaches_the_model(task: Task):
    model = model_of(task, Schema())
    batches = [
        task.collate(task.encode(frame(text_pair=others), Schema(), 32), [0, 1, 2]) for others in (TEXTS, TEXTS[::-1])
    ]
    assert float(task.loss(model, batches[0])) != float(task.loss(model, batches[1]))


def test_metrics_are_in_the_unit_of_the_labels_whatever_the_scale(tiny_bert: Path, task: Task):
    scaled = task_on(tiny_bert, "regression", center=2.5, scale=2.0)
    model = model_of(task, Schema())
    batch = task.collate(task.encode(frame(), Schema(), 32), [0, 1, 2])
    plain, other = task.statistics(model, batch), scaled.statistics(model, batch)
    np.testing.assert_allclose(other["predicted"], 2.0 * plain["predicted"] + 2.5)
    np.testing.assert_array_equal(other["target"], plain["target"])
    found = scaled.metrics(other)
    assert found["mse"] == pytest.approx(4.0 * found["loss"])
    assert float(scaled.loss(model, batch)) == pytest.approx(found["loss"], rel=1e-6)


def test_a_scale_must_be_positive(tiny_bert: Path):
    with pytest.raises(InputError, match=r"task\.scale.*greater than 0"):
        task_on(tiny_bert, "regression", scale=0)


def test_correlations_are_scipys(task: Task):
    rng = np.random.default_rng(0)
    target = rng.integers(0, 6, 50).astype(float)  # with ties
    predicted = target + rng.normal(size=50)
    found = task.metrics({"loss": np.ones(50), "predicted": predicted, "target": target})
    assert found["pearson"] == pytest.approx(pearsonr(predicted, target).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(predicted, target).statistic)
    assert found["mse"] == pytest.approx(np.mean((predicted - target) ** 2))


@pytest.mark.parametrize(
    ("predicted", "target"),
    [([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]), ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0]), ([1.0], [2.0])],
)
def test_a_constant_has_no_correlation_and_gives_no_warning(task: Task, predicted: list[float], target: list[float]):
    found = task.metrics({"loss": np.ones(1), "predicted": np.array(predicted), "target": np.array(target)})
    assert found["pearson"] == found["spearman"] == 0.0


def test_zero_shot_answers_the_mean_of_the_training_labels(task: Task):
    rows = task.encode(frame([1.0, 3.0, 10.0]), Schema(), 32)
    found = task.zero_shot(rows, np.array([0, 1]), np.array([2, 0]))
    assert found is not None
    assert found["predicted"].tolist() == [2.0, 2.0]
    assert task.metrics(found) == {"pearson": 0.0, "spearman": 0.0, "mse": 32.5, "loss": 32.5}
