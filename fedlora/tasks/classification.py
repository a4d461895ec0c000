"""Sequence classification of one text or of a pair of texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from fedlora.errors import InputError
from fedlora.tasks.base import Batch, Schema, Statistics, Task, register
from fedlora.tokens import TokenisedRows


@register
class Classification(Task):
    """Predict one of the labels that the data as a whole has, whatever labels a client happens to hold."""

    name = "classification"
    auto_class = AutoModelForSequenceClassification
    head_modules = ("classifier", "score")
    main_metric = "accuracy"

    def schema(self, rows: pd.DataFrame) -> Schema:
        """The sorted distinct labels of all rows, as text."""
        labels = sorted({str(label) for label in rows["label"]})
        if len(labels) < 2:
            raise InputError(
                f"The data set has one class only ({labels[0]!r}), so there is nothing to learn. "
                "Check data.label: it must name the column with the classes."
            )
        if len(labels) > 1000:
            raise InputError(
                f"data.label names a column with {len(labels)} different values; classification takes at most 1000."
            )
        return Schema(tuple(labels))

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, rows: pd.DataFrame, schema: Schema, max_length: int
    ) -> TokenisedRows:
        """Tokenise text (and text_pair) with the tokenizer's own special tokens."""
        texts = rows["text"].tolist()
        pairs = rows["text_pair"].tolist() if "text_pair" in rows else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_token_type_ids=True)
        segments = None
        if pairs is not None and "token_type_ids" in tokenizer.model_input_names:
            segments = [types.index(1) if 1 in types else len(types) for types in encoded["token_type_ids"]]
        ids: Any = encoded["input_ids"]
        number = {label: i for i, label in enumerate(schema.labels)}
        targets = [number[str(label)] for label in rows["label"]]
        return TokenisedRows.from_lists(ids, targets, segments, sum(len(row) >= max_length for row in ids))

    def model_overrides(self, schema: Schema, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The number of labels, and the padding token that decoders need to find the last token."""
        return {"num_labels": len(schema.labels), "pad_token_id": tokenizer.pad_token_id}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(_logits(model, batch), batch["target"])

    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Loss, predicted and true class of every row."""
        logits = _logits(model, batch)
        loss = functional.cross_entropy(logits, batch["target"], reduction="none")
        return {
            "loss": loss.double().cpu().numpy(),
            "predicted": logits.argmax(dim=-1).cpu().numpy(),
            "target": batch["target"].cpu().numpy(),
        }

    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """Accuracy, macro-F1, Matthews correlation and loss."""
        predicted, target = statistics["predicted"], statistics["target"]
        return {
            "accuracy": float((predicted == target).mean()),
            "macro_f1": float(f1_score(target, predicted, average="macro", zero_division=0)),  # pyright: ignore
            "mcc": float(matthews_corrcoef(target, predicted)) if len(set(target)) > 1 else 0.0,
            "loss": float(statistics["loss"].mean()),
        }

    def zero_shot(self, train_targets: np.ndarray, targets: np.ndarray) -> Statistics | None:
        """The majority class, with the training frequencies as probabilities."""
        counts = np.bincount(train_targets, minlength=int(max(train_targets.max(), targets.max())) + 1)
        probability = (counts + 1) / (counts + 1).sum()
        return {
            "loss": -np.log(probability[targets]),
            "predicted": np.full_like(targets, counts.argmax()),
            "target": targets,
        }


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "target"}
    return model(**inputs).logits.float()
