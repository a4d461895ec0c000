"""Regression: one number for a text or a pair of texts, such as a rating or a degree of similarity."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.tasks.base import Batch, Schema, Statistics, Task, TaskConfig, register
from fedlora.tasks.classification import encode_texts, text_logits


class RegressionConfig(TaskConfig):
    """Regression's settings. The model learns ``(label - center) / scale``; metrics are in the labels' own unit.

    Both are settings and not computed, because the mean of all clients' labels is no public knowledge.

    Attributes:
        center: the label that becomes 0, such as the middle of the range.
        scale: the difference of labels that becomes 1, such as half of the range.
    """

    center: float = 0.0
    scale: float = Field(default=1.0, gt=0)


@register
class Regression(Task):
    """Predict a number, by the mean squared error."""

    Config = RegressionConfig
    name = "regression"
    auto_class = AutoModelForSequenceClassification
    head_modules = ("classifier", "score")
    default_metric = "spearman"
    pooled = True

    @property
    def settings(self) -> RegressionConfig:
        """The settings with their own type."""
        return cast(RegressionConfig, self.config)

    def schema(self, rows: pd.DataFrame) -> Schema:
        """Nothing to agree on.

        Raises:
            InputError: a label is no finite number.
        """
        finite_numbers(rows["label"])
        return Schema()

    def encode(self, rows: pd.DataFrame, schema: Schema, max_length: int) -> EncodedRows:
        """Tokenise text (and text_pair); ``target [rows]`` is the label in its own unit, fp32."""
        return EncodedRows.from_lists(*encode_texts(self, rows, max_length, target=finite_numbers(rows["label"])))

    def model_overrides(self, schema: Schema) -> dict[str, Any]:
        """One output, and the padding token that decoders need to find the last token."""
        return {"num_labels": 1, "problem_type": "regression", "pad_token_id": self.backbone.pad_id}

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Squared error of ``(label - center) / scale`` of every row."""
        return (text_logits(model, batch)[:, 0] - self._standardised(batch["target"])).square()

    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Predicted and true number of every row, and its squared error after scaling."""
        output = text_logits(model, batch)[:, 0]
        return {
            "loss": (output - self._standardised(batch["target"])).square().double().cpu().numpy(),
            "predicted": (output.double() * self.settings.scale + self.settings.center).cpu().numpy(),
            "target": batch["target"].double().cpu().numpy(),
        }

    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """Pearson's and Spearman's correlation, mean squared error, and loss (that error after scaling)."""
        from scipy.stats import rankdata  # a third of a second, and training needs none

        predicted, target = statistics["predicted"], statistics["target"]
        return {
            "pearson": correlation(predicted, target),
            "spearman": correlation(rankdata(predicted), rankdata(target)),
            "mse": float(np.square(predicted - target).mean()),
            "loss": float(statistics["loss"].mean()),
        }

    def zero_shot(self, rows: EncodedRows, train: np.ndarray, asked: np.ndarray) -> Statistics | None:
        """The mean of the training labels."""
        target = rows.fixed["target"].astype(np.float64)
        mean = target[train].mean()
        return {
            "loss": np.square((target[asked] - mean) / self.settings.scale),
            "predicted": np.full(len(asked), mean),
            "target": target[asked],
        }

    def _standardised(self, target: Tensor) -> Tensor:
        return (target - self.settings.center) / self.settings.scale


def finite_numbers(labels: Any) -> np.ndarray:
    """A column of labels as numbers ``[rows]``, fp32.

    Raises:
        InputError: a label is no finite number.
    """
    numbers = np.asarray(pd.to_numeric(labels, errors="coerce"), dtype=np.float64)
    bad = ~(np.abs(numbers) <= np.finfo(np.float32).max)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"data.label: {int(bad.sum())} of {len(labels)} labels are no finite numbers, the first is "
            f"{labels.iloc[row]!r} in row {row + 1} (rows count from 1). task=regression needs numbers; for classes "
            "choose task=classification."
        )
    return numbers.astype(np.float32)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation of two vectors ``[n]``; 0.0 where either is constant, so that every client has a value."""
    x, y = one - one.mean(), other - other.mean()
    norms = np.linalg.norm(x), np.linalg.norm(y)
    small = (1e-9 * np.linalg.norm(one), 1e-9 * np.linalg.norm(other))  # rounding of a constant
    if norms[0] <= small[0] or norms[1] <= small[1]:
        return 0.0
    return float(np.clip((x / norms[0]) @ (y / norms[1]), -1.0, 1.0))
