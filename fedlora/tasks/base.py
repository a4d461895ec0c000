"""The task seam: how rows become batches, what the loss is, and which numbers say how good a model is.

A task is one small class. Register one of ours with ``@register``; name a user's own by import path or file path,
``task.name=./mytask.py:MyTask``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedlora.backbone import Backbone
from fedlora.config import Settings, nearest, validate
from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.plugins import is_plugin_path, load_object

Batch = dict[str, Tensor]
Statistics = dict[str, np.ndarray]
MODEL_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "pixel_values"})
IGNORED = -100
"""The label of a token that carries no loss, as in transformers."""


@dataclass(frozen=True)
class Schema:
    """What all clients agree on before training.

    Attributes:
        labels: for classification: the global list of labels, in id order.
        picture: shape (channels, height, width) of pictures, where the models are built for those of the data.
    """

    labels: tuple[str, ...] = ()
    picture: tuple[int, int, int] | None = None


class TaskConfig(Settings):
    """Settings that every task has; a task with more of them subclasses this.

    Attributes:
        metric: the metric that "best" and tables use; ``None`` takes the task's own.
    """

    name: str
    metric: str | None = None


class Task(ABC):
    """One kind of work. It holds its settings and knows the backbone, and has no other state.

    Attributes:
        auto_class: the transformers auto class of the model.
        head_modules: top-level modules of the model that form the task head (model-specific names; all that exist
            are used).
        default_metric: the metric that "best" and tables use; higher is better.
        columns: the columns of :func:`fedlora.data.sources.load_rows` that the task reads; the first must be there.
        nested: those of its columns whose values may be lists or arrays.
        pooled: loss and statistics read one output a row and nothing of the single tokens.
    """

    Config: ClassVar[type[TaskConfig]] = TaskConfig
    name: ClassVar[str]
    auto_class: ClassVar[Any]
    head_modules: ClassVar[tuple[str, ...]] = ()
    default_metric: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")
    nested: ClassVar[tuple[str, ...]] = ()
    pooled: ClassVar[bool] = False

    def __init__(self, config: TaskConfig, backbone: Backbone) -> None:
        self.config = config
        self.backbone = backbone

    @property
    def main_metric(self) -> str:
        """The metric that "best" and tables use; higher is better."""
        return self.config.metric or self.default_metric

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        return self.backbone.tokenizer()

    @property
    def encoding_key(self) -> str:
        """Everything beyond rows, schema and code that :meth:`encode` depends on; the key of its cache."""
        return self.backbone.tokenizer_key() + self.config.model_dump_json(exclude={"metric"})

    @abstractmethod
    def schema(self, rows: pd.DataFrame) -> Schema:
        """Derive the global schema from all rows.

        Raises:
            InputError: the rows cannot serve this task.
        """

    def agreed(self, rows: pd.DataFrame, labels: tuple[str, ...]) -> Schema:
        """The schema where ``labels`` were agreed on before anybody looked at rows.

        Raises:
            InputError: the task has no labels to agree on.
        """
        raise InputError(
            f"data.labels has no effect: task {type(self).__name__} has no labels to agree on. Set data.labels=null."
        )

    @abstractmethod
    def encode(self, rows: pd.DataFrame, schema: Schema, max_length: int) -> EncodedRows:
        """Turn all rows into arrays once, truncated to ``max_length`` tokens.

        Raises:
            InputError: a row cannot be used.
        """

    def collate(self, rows: EncodedRows, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Rows as one batch, padded to the longest of them; see :func:`collate`."""
        return collate(rows, numbers, self.backbone.pad_id)

    def inputs(self, batch: Batch) -> Batch:
        """What of a batch the model is called with, by name."""
        return model_inputs(batch)

    def model_overrides(self, schema: Schema) -> dict[str, Any]:
        """Configuration overrides for the model, such as the number of labels."""
        return {}

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of every row ``[b]``, summed over whatever :meth:`row_weights` counts.

        A task that gives only :meth:`loss` trains one client after the other.
        """
        raise NotImplementedError(f"task {type(self).__name__} gives neither row_losses nor loss")

    def row_weights(self, batch: Batch) -> Tensor:
        """What each row's loss is summed over ``[b]``, such as its answer tokens; 1 by default."""
        return torch.ones(len(next(iter(batch.values()))))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar: the sum of all row losses over the sum of all row weights."""
        return self.row_losses(model, batch).sum() / self.row_weights(batch).sum().clamp(min=1)

    def weight(self, batch: Batch) -> int:
        """What the mean of :meth:`loss` was taken over."""
        return int(self.row_weights(batch).sum())

    @abstractmethod
    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Numbers per row ``{name: [rows, ...]}`` from which metrics of any group of rows can be computed."""

    @abstractmethod
    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """Metrics of a group of rows, ``loss`` and :attr:`main_metric` among them."""

    def zero_shot(self, rows: EncodedRows, train: np.ndarray, asked: np.ndarray) -> Statistics | None:
        """Statistics of the rows ``asked`` answered without training, knowing only the targets of the rows ``train``.

        ``None`` means: evaluate the untouched backbone.
        """
        return None

    def sample(self, model: nn.Module, rows: EncodedRows, row: int) -> dict[str, str] | None:
        """One row's prompt, reference and the model's own answer, to be read by people; ``None`` if it has no such."""
        return None


def collate(rows: EncodedRows, numbers: Sequence[int] | np.ndarray, pad_id: int) -> Batch:
    """Pad rows to the longest of them.

    Returns:
        Every ragged array as ``[b, t]`` (``input_ids`` filled with ``pad_id``, ``labels`` with -100, others with 0),
        ``attention_mask`` ``[b, t]`` where there are tokens, and every fixed array as ``[b, ...]``.
    """
    chosen = np.asarray(numbers, dtype=np.int64)
    batch: Batch = {}
    if rows.ragged:
        lengths = rows.lengths(chosen)
        real = np.arange(lengths.max()) < lengths[:, None]
        for name, flat in rows.ragged.items():
            padded = np.full(real.shape, {"input_ids": pad_id, "labels": IGNORED}.get(name, 0), dtype=np.int64)
            padded[real] = np.concatenate([flat[rows.offsets[n] : rows.offsets[n + 1]] for n in chosen])
            batch[name] = torch.from_numpy(padded)
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
    for name, values in rows.fixed.items():
        batch[name] = torch.from_numpy(values[chosen])
    return batch


def model_inputs(batch: Batch) -> Batch:
    """What of a batch a transformers model takes: everything but our own targets."""
    return {key: value for key, value in batch.items() if key in MODEL_INPUTS}


_REGISTRY: dict[str, type[Task]] = {}
AnyTask = TypeVar("AnyTask", bound=Task)


def register(task: type[AnyTask]) -> type[AnyTask]:
    """Class decorator: make a task available as ``task=<name>``."""
    _REGISTRY[task.name] = task
    return task


def build_task(settings: Mapping[str, Any], backbone: Backbone) -> Task:
    """Return the task ``settings["name"]`` (registered, import path or ``file.py:Class``) with its settings checked.

    Raises:
        InputError: no such task, or a setting that it does not take.
    """
    name = str(settings.get("name"))
    if is_plugin_path(name):
        task = load_object(name, "task.name")
        if not (isinstance(task, type) and issubclass(task, Task)):
            raise InputError(f"task.name = '{name}' is no task: subclass fedlora.tasks.Task.")
    elif name in _REGISTRY:
        task = _REGISTRY[name]
    else:
        raise InputError(f"task.name = '{name}' is not known.{nearest(name, _REGISTRY)} Known: {sorted(_REGISTRY)}.")
    return task(validate(task.Config, settings, "task"), backbone)


def plain_text(rows: pd.DataFrame, column: str) -> list[str]:
    """A column as a list of strings."""
    return [str(value) for value in rows[column]]
