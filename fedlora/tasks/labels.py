"""Shared by every task that predicts one class a row: the schema, the loss, the statistics and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from fedlora.config import nearest
from fedlora.errors import InputError
from fedlora.tasks.base import Batch, Schema, Statistics

MAX_CLASSES = 1000
CALIBRATION_BINS = 15


def class_schema(rows: pd.DataFrame) -> Schema:
    """The sorted distinct labels of all rows, as text.

    Raises:
        InputError: there are fewer than two classes, or so many that the column is no label.
    """
    labels = sorted({str(label) for label in rows["label"]})
    if len(labels) < 2:
        raise InputError(
            f"The data set has one class only ({labels[0]!r}), so there is nothing to learn. "
            "Check data.label: it must name the column with the classes. (data.limit takes the first rows only: "
            "raise it where they are sorted by class.)"
        )
    if len(labels) > MAX_CLASSES:
        raise InputError(
            f"data.label names a column with {len(labels)} different values; classification takes at most "
            f"{MAX_CLASSES}. For numbers choose task=regression, for free text task=causal_lm."
        )
    return Schema(tuple(labels))


def class_numbers(labels: Sequence[str], schema: Schema) -> np.ndarray:
    """The class id of every label ``[rows]``, int64.

    Raises:
        InputError: a label is not in the schema.
    """
    number = {label: i for i, label in enumerate(schema.labels)}
    foreign = sorted(set(labels) - number.keys())
    if foreign:
        raise InputError(
            f"The label {foreign[0]!r} of {list(labels).count(foreign[0])} rows is none of those that all clients "
            f"agree on: {', '.join(schema.labels)}. Correct the rows, or data.labels."
            f"{nearest(foreign[0], schema.labels)}"
        )
    return np.array([number[label] for label in labels], dtype=np.int64)


def label_names(schema: Schema) -> dict[str, Any]:
    """What a model's configuration says of its classes, so that an exported model names them."""
    return {
        "num_labels": len(schema.labels),
        "id2label": dict(enumerate(schema.labels)),
        "label2id": {label: i for i, label in enumerate(schema.labels)},
    }


def class_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of every row ``[b]`` from logits ``[b, classes]``."""
    return functional.cross_entropy(logits, batch["target"], reduction="none")


def class_statistics(logits: Tensor, batch: Batch) -> Statistics:
    """Loss, predicted and true class of every row, and the probability of the predicted one."""
    confidence, predicted = torch.softmax(logits, dim=-1).max(dim=-1)
    return {
        "loss": class_losses(logits, batch).double().cpu().numpy(),
        "predicted": predicted.cpu().numpy(),
        "confidence": confidence.double().cpu().numpy(),
        "target": batch["target"].cpu().numpy(),
        "classes": np.full(len(logits), logits.shape[-1]),
    }


def class_metrics(statistics: Statistics, calibration: bool) -> dict[str, float]:
    """Accuracy, macro-F1, Matthews correlation and loss; ``f1`` of the second of two classes; ``ece`` on demand."""
    from sklearn.metrics import f1_score, matthews_corrcoef  # half a second, and training needs none

    predicted, target = statistics["predicted"], statistics["target"]
    metrics = {
        "accuracy": float((predicted == target).mean()),
        "macro_f1": float(f1_score(target, predicted, average="macro", zero_division=0)),  # pyright: ignore
        "mcc": float(matthews_corrcoef(target, predicted)) if len(set(target)) > 1 else 0.0,
        "loss": float(statistics["loss"].mean()),
    }
    if statistics["classes"][0] == 2:
        metrics["f1"] = float(f1_score(target, predicted, average="binary", zero_division=0))  # pyright: ignore
    if calibration:
        metrics["ece"] = calibration_error(statistics["confidence"], predicted == target)
    return metrics


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error over 15 equal bins (Guo et al. 2017, eq. 3): mean |accuracy - confidence|."""
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def majority(train: np.ndarray, asked: np.ndarray) -> Statistics:
    """The majority class of the targets ``train`` as the answer to every target ``asked``."""
    counts = np.bincount(train, minlength=int(max(train.max(), asked.max())) + 1) + 1
    probability = counts / counts.sum()
    return {
        "loss": -np.log(probability[asked]),
        "predicted": np.full_like(asked, counts.argmax()),
        "confidence": np.full(len(asked), probability.max()),
        "target": asked,
        "classes": np.full(len(asked), len(counts)),
    }
