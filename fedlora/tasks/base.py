"""The task seam: how rows become batches, what the loss is, and which numbers say how good a model is.

A task is one small object. Register one of ours with ``@register``; name a user's own by import path or file path,
``task.name=./mytask.py:MyTask``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedlora.config import nearest
from fedlora.errors import InputError
from fedlora.plugins import is_plugin_path, load_object
from fedlora.tokens import TokenisedRows

Batch = dict[str, Tensor]
Statistics = dict[str, np.ndarray]


@dataclass(frozen=True)
class Schema:
    """What all clients agree on before training: for classification the global list of labels, in id order."""

    labels: tuple[str, ...] = ()


class Task(ABC):
    """One kind of work. Stateless: everything that varies is an argument.

    Attributes:
        auto_class: the transformers auto class of the model.
        head_modules: top-level modules of the model that form the task head (model-specific names; all that exist
            are used).
        main_metric: the metric that "best" and tables use; higher is better.
    """

    name: ClassVar[str]
    auto_class: ClassVar[Any]
    head_modules: ClassVar[tuple[str, ...]] = ()
    main_metric: ClassVar[str]

    @abstractmethod
    def schema(self, rows: pd.DataFrame) -> Schema:
        """Derive the global schema from all rows.

        Raises:
            InputError: the rows cannot serve this task.
        """

    @abstractmethod
    def encode(
        self, tokenizer: PreTrainedTokenizerBase, rows: pd.DataFrame, schema: Schema, max_length: int
    ) -> TokenisedRows:
        """Tokenise all rows once, truncated to ``max_length`` tokens."""

    def model_overrides(self, schema: Schema, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Configuration overrides for the model, such as the number of labels."""
        return {}

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""

    def weight(self, batch: Batch) -> int:
        """What the mean of :meth:`loss` was taken over: the rows of the batch."""
        return len(batch["target"])

    @abstractmethod
    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Numbers per row ``{name: [rows]}`` from which metrics of any group of rows can be computed."""

    @abstractmethod
    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """Metrics of a group of rows, ``loss`` and :attr:`main_metric` among them."""

    def zero_shot(self, train_targets: np.ndarray, targets: np.ndarray) -> Statistics | None:
        """Statistics of the answer that needs no training, or ``None`` to use the untouched backbone."""
        return None


def collate(rows: TokenisedRows, numbers: Sequence[int] | np.ndarray, pad_id: int) -> Batch:
    """Pad rows to the longest of them: ``input_ids``, ``attention_mask`` ``[b, t]`` and ``target`` ``[b]``."""
    pieces = [rows.ids(int(number)) for number in numbers]
    width = max(len(piece) for piece in pieces)
    input_ids = torch.full((len(pieces), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(pieces), width), dtype=torch.long)
    for i, piece in enumerate(pieces):
        input_ids[i, : len(piece)] = torch.from_numpy(piece.astype(np.int64))
        mask[i, : len(piece)] = 1
    batch = {"input_ids": input_ids, "attention_mask": mask}
    if rows.segments is not None:
        types = torch.zeros((len(pieces), width), dtype=torch.long)
        for i, number in enumerate(numbers):
            types[i, int(rows.segments[number]) : len(pieces[i])] = 1
        batch["token_type_ids"] = types
    batch["target"] = torch.from_numpy(rows.targets[np.asarray(numbers, dtype=np.int64)])
    return batch


_REGISTRY: dict[str, type[Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Class decorator: make a task available as ``task=<name>``."""
    _REGISTRY[task.name] = task
    return task


def build_task(name: str) -> Task:
    """Return the registered task ``name``, or the user's task at an import path or ``file.py:Class``.

    Raises:
        InputError: no such task.
    """
    if is_plugin_path(name):
        return load_object(name, "task.name")()
    if name not in _REGISTRY:
        raise InputError(f"task.name = '{name}' is not known.{nearest(name, _REGISTRY)} Known: {sorted(_REGISTRY)}.")
    return _REGISTRY[name]()
