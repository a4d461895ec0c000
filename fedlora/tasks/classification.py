"""Sequence classification of one text or of a pair of texts."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fedlora.encoded import EncodedRows
from fedlora.tasks.base import Batch, Schema, Statistics, Task, TaskConfig, model_inputs, plain_text, register
from fedlora.tasks.labels import (
    class_losses,
    class_metrics,
    class_numbers,
    class_schema,
    class_statistics,
    label_names,
    majority,
)


class ClassificationConfig(TaskConfig):
    """Classification's settings.

    Attributes:
        calibration: also report the expected calibration error ``ece`` of the predicted probabilities.
    """

    calibration: bool = False


@register
class Classification(Task):
    """Predict one of the labels that the data as a whole has, whatever labels a client happens to hold."""

    Config = ClassificationConfig
    name = "classification"
    auto_class = AutoModelForSequenceClassification
    head_modules = ("classifier", "score")
    default_metric = "accuracy"
    pooled = True

    def schema(self, rows: pd.DataFrame) -> Schema:
        """The sorted distinct labels of all rows, as text."""
        return class_schema(rows)

    def agreed(self, rows: pd.DataFrame, labels: tuple[str, ...]) -> Schema:
        """``labels``, in this order."""
        return Schema(labels)

    def encode(self, rows: pd.DataFrame, schema: Schema, max_length: int) -> EncodedRows:
        """Tokenise text (and text_pair) with the tokenizer's own special tokens."""
        return EncodedRows.from_lists(
            *encode_texts(self, rows, max_length, target=class_numbers(plain_text(rows, "label"), schema))
        )

    def model_overrides(self, schema: Schema) -> dict[str, Any]:
        """The labels by name, for the exported model, and the padding token that decoders need."""
        return {**label_names(schema), "pad_token_id": self.backbone.pad_id}

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of every row."""
        return class_losses(self.logits(model, batch), batch)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits ``[b, classes]`` in fp32."""
        return text_logits(model, batch)

    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Loss, predicted and true class of every row, and the probability of the predicted one."""
        return class_statistics(self.logits(model, batch), batch)

    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """Accuracy, macro-F1, Matthews correlation and loss; ``f1`` of the second of two classes; ``ece`` on demand."""
        return class_metrics(statistics, cast(ClassificationConfig, self.config).calibration)

    def zero_shot(self, rows: EncodedRows, train: np.ndarray, asked: np.ndarray) -> Statistics | None:
        """The majority class, with the training frequencies as probabilities."""
        return majority(rows.fixed["target"][train], rows.fixed["target"][asked])


def encode_texts(
    task: Task, rows: pd.DataFrame, max_length: int, **fixed: Any
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Token ids (and segments of pairs), the ``fixed`` arrays, and how many rows did not fit ``max_length``."""
    texts = plain_text(rows, "text")
    pairs = plain_text(rows, "text_pair") if "text_pair" in rows else None
    tokenizer = task.tokenizer
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_token_type_ids=True)
    ids: Any = encoded["input_ids"]
    ragged = {"input_ids": ids}
    if pairs is not None and "token_type_ids" in tokenizer.model_input_names:
        ragged["token_type_ids"] = encoded["token_type_ids"]
    return ragged, fixed, count_longer(tokenizer, texts, pairs, ids, max_length)


def count_longer(tokenizer: Any, texts: list[str], pairs: list[str] | None, ids: list[Any], max_length: int) -> int:
    """How many texts have more than ``max_length`` tokens, given their ``ids`` after truncation to it."""
    full = [i for i, row in enumerate(ids) if len(row) >= max_length]  # exactly as long, or cut
    if not full:
        return 0
    whole = tokenizer([texts[i] for i in full], None if pairs is None else [pairs[i] for i in full])["input_ids"]
    return sum(len(row) > max_length for row in whole)


def text_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits ``[b, outputs]`` in fp32."""
    return model(**model_inputs(batch)).logits.float()
