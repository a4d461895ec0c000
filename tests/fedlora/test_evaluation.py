from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fedlora.encoded import EncodedRows
from fedlora.evaluation import client_metrics, each_client, loss_gradients, row_statistics, split_statistics
from fedlora.federation import Federation
from fedlora.tasks import Statistics
from tests.fedlora.helpers import TARGETS, assert_same, of_architecture, random_state

ROWS = np.array([17, 3, 101, 4, 55, 9, 8, 200, 31, 60, 2])  # rows of unequal length, in no order


def model_of(federation: Federation):
    model = federation.build_model()
    model.load({key: value for key, value in random_state(model, model.shared).items() if key in model.head})
    return model


def statistics(federation: Federation, model, rows: np.ndarray, batch_size: int) -> Statistics:
    return row_statistics(model, federation.task, federation.rows, rows, batch_size)


def assert_close(one: Statistics, other: Statistics) -> None:
    assert one.keys() == other.keys()
    for name, values in other.items():
        np.testing.assert_allclose(one[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 11, 64])
def test_row_statistics_do_not_depend_on_the_batch_size(tiny, batch_size: int):
    federation = Federation(tiny())
    model = model_of(federation)
    assert_close(statistics(federation, model, ROWS, batch_size), statistics(federation, model, ROWS, 3))


def test_row_statistics_of_a_language_model_do_not_depend_on_the_batch_size(tiny_lm):
    federation = Federation(tiny_lm())
    model = federation.build_model()
    model.load(random_state(model, model.shared))
    ids = [list(range(5, 5 + n)) for n in (9, 3, 14, 3, 6)]
    labels = [[-100] * start + row[start:] for row, start in zip(ids, [2, 1, 6, 2, 5], strict=True)]
    rows = EncodedRows.from_lists({"input_ids": ids, "labels": labels}, {})
    one, all_at_once = (row_statistics(model, federation.task, rows, np.arange(5), size) for size in (1, 5))
    assert_close(one, all_at_once)


def test_row_statistics_are_in_the_order_of_the_rows(tiny):
    federation = Federation(tiny())
    model = model_of(federation)
    together = statistics(federation, model, ROWS, 4)
    for place, row in enumerate(ROWS):
        alone = statistics(federation, model, np.array([row]), 1)
        assert_close({name: values[place : place + 1] for name, values in together.items()}, alone)
    np.testing.assert_array_equal(together["target"], federation.rows.fixed["target"][ROWS])
    assert len(np.unique(together["loss"])) > 5  # otherwise order could not be seen


def test_no_rows_give_no_statistics(tiny):
    federation = Federation(tiny())
    assert statistics(federation, federation.build_model(), ROWS[:0], 4) == {}


def answers(*correct: int) -> Statistics:
    """One row per argument: 1 is right, 0 is wrong."""
    predicted = np.array(correct)
    return {
        "loss": np.zeros(len(correct)),
        "predicted": predicted,
        "target": np.ones_like(predicted),
        "classes": 2 + 0 * predicted,
    }


def test_client_metrics_count_every_client_once_whatever_its_size(tiny):
    task = Federation(tiny()).task
    clients = {"small": answers(1), "large": answers(*[0] * 99, 1), "half": answers(0, 1)}
    result = client_metrics(task, each_client(task, clients))
    accuracies = np.array([1.0, 0.01, 0.5])
    assert result["mean"] == pytest.approx(accuracies.mean())
    assert result["std"] == pytest.approx(accuracies.std())
    assert result["worst"] == pytest.approx(0.01)


def test_the_worst_decile_is_the_mean_of_the_worst_tenth_of_clients(tiny):
    task = Federation(tiny()).task
    clients = {f"c{i}": answers(*[1] * i, *[0] * (20 - i)) for i in reversed(range(20))}
    result = client_metrics(task, each_client(task, clients))
    assert result["worst"] == 0.0
    assert result["worst_decile"] == pytest.approx((0 / 20 + 1 / 20) / 2)
    few = each_client(task, {"a": answers(0, 1), "b": answers(1)})
    assert client_metrics(task, few)["worst_decile"] == 0.5  # at least one client


def test_statistics_are_cut_where_the_groups_end():
    whole = {"loss": np.arange(6.0), "target": np.arange(6)}
    parts = split_statistics(whole, {"a": 2, "none": 0, "b": 4})
    assert parts["a"]["loss"].tolist() == [0, 1]
    assert parts["none"]["loss"].tolist() == []
    assert parts["b"]["target"].tolist() == [2, 3, 4, 5]


# Gradients of the public sample -----------------------------------------------------------------------------------


def gradients(federation: Federation, model, rows: np.ndarray, batch_size: int) -> dict[str, torch.Tensor]:
    return loss_gradients(model, federation.task, federation.rows, rows, batch_size)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_loss_gradients_are_autograds_of_the_summed_loss(tiny, request, architecture: str, batch_size: int):
    federation = Federation(tiny(*of_architecture(architecture, request.getfixturevalue(architecture))))
    model = model_of(federation)
    found = gradients(federation, model, ROWS, batch_size)
    bases = {name: layer.get_base_layer() for name, layer in model.layers.items()}
    weights = [base.weight.requires_grad_(True) for base in bases.values()]
    batch = federation.task.collate(federation.rows, ROWS)
    inputs = {key: value for key, value in batch.items() if key != "target"}
    summed = torch.nn.functional.cross_entropy(model.module(**inputs).logits, batch["target"], reduction="sum")
    expected = torch.autograd.grad(summed, weights)
    assert list(found) == list(bases)
    for (name, base), gradient in zip(bases.items(), expected, strict=True):
        oriented = gradient.T if isinstance(base, Conv1D) else gradient
        assert found[name].shape == (model.layers[name].out_features, model.layers[name].in_features)
        torch.testing.assert_close(found[name], oriented, rtol=1e-3, atol=1e-5 * oriented.abs().max().item())


def test_loss_gradients_leave_the_model_as_it_was(tiny):
    federation = Federation(tiny("method=ffa"))
    model = model_of(federation)
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    gradients(federation, model, ROWS, 4)
    model.assert_trainables()
    assert all(layer.get_base_layer().weight.grad is None for layer in model.layers.values())
    assert_same(dict(model.module.named_parameters()), before)
    once, twice = (gradients(federation, model, ROWS, 4) for _ in range(2))
    assert_same(twice, once)  # nothing accumulates


def test_gradients_of_a_language_model_do_not_depend_on_the_batch_size(tiny_lm):
    federation = Federation(tiny_lm("method=fed_sb"))
    model = federation.build_model()
    rows = federation.index.public
    by_size = [gradients(federation, model, rows, size) for size in (1, 5, 8)]
    for name, expected in by_size[0].items():
        for other in by_size[1:]:
            torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()) + 1e-7)
