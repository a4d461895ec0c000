"""Run a model over rows: statistics per row, metrics of groups of rows, and gradients of a public sample."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import State
from fedlora.client_axis import ClientAxis
from fedlora.config import nearest
from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from fedlora.tasks import Statistics, Task

Group = TypeVar("Group", bound=Hashable)
LOWER_IS_BETTER = frozenset({"loss", "mse", "perplexity", "ece"})
"""Metrics of our tasks that cannot be the main one."""


def row_statistics(
    model: AdaptedModel, task: Task, encoded: EncodedRows, rows: np.ndarray, batch_size: int
) -> Statistics:
    """Statistics of every row in the order of ``rows``; batches are sorted by length to waste little padding."""
    order = np.argsort(encoded.lengths(rows), kind="stable")
    parts: list[Statistics] = []
    with torch.no_grad():
        for batch in _batches(rows[order], batch_size):
            parts.append(task.statistics(model.module, model.to_device(task.collate(encoded, batch))))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]} if parts else {}


def statistics_of_clients(
    model: AdaptedModel,
    axis: ClientAxis | None,
    task: Task,
    encoded: EncodedRows,
    state_of: Callable[[str], State],
    rows: Mapping[str, np.ndarray],
    batch_size: int,
) -> dict[str, Statistics]:
    """Statistics of each client's ``rows`` with its own trained tensors, in the order of its rows.

    With an ``axis`` the rows of several clients share a batch, for tasks that read one output a row. ``state_of`` is
    asked when a client's turn comes: tensors of the clients of one batch are held, not those of all.
    """
    if axis is None or not task.pooled:
        found = {}
        for client, own in rows.items():
            model.load(state_of(client))
            found[client] = row_statistics(model, task, encoded, own, batch_size)
        return found
    parts: dict[str, list[Statistics]] = {client: [] for client in rows}
    for batch in _client_batches(rows, batch_size):
        states = [state_of(client) for client, _ in batch]
        stacked = {key: torch.stack([state[key] for state in states]).to(model.device) for key in model.per_client}
        collated = model.to_device(task.collate(encoded, np.concatenate([own for _, own in batch])))
        with torch.no_grad(), axis.weights(stacked, [len(own) for _, own in batch]):
            statistics = task.statistics(model.module, collated)
        for (client, _), part in zip(batch, _split(statistics, [len(own) for _, own in batch]), strict=True):
            parts[client].append(part)
    return {client: joined_statistics(found) for client, found in parts.items() if found}


def _client_batches(rows: Mapping[str, np.ndarray], size: int) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Pieces of the clients' rows, at most ``size`` rows together."""
    batch: list[tuple[str, np.ndarray]] = []
    for client, own in rows.items():
        for piece in _batches(own, size):
            if batch and sum(len(there) for _, there in batch) + len(piece) > size:
                yield batch
                batch = []
            batch.append((client, piece))
    if batch:
        yield batch


def joined_statistics(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of several groups as those of one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def each_client(task: Task, statistics: Mapping[str, Statistics]) -> dict[str, dict[str, float]]:
    """Every metric of every client, by client."""
    return {client: task.metrics(of_client) for client, of_client in statistics.items()}


def client_metrics(task: Task, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The main metric over clients: mean, standard deviation, worst client, and mean of the worst tenth of clients.

    Args:
        task: whose main metric it is.
        metrics: of :func:`each_client`.
    """
    values = np.sort([main_value(task, of_client) for of_client in metrics.values()])
    decile = max(1, round(len(values) / 10))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "worst_decile": float(values[:decile].mean()),
        "worst": float(values[0]),
    }


def main_value(task: Task, metrics: Mapping[str, float]) -> float:
    """The main metric among ``metrics``.

    Raises:
        InputError: ``task.metric`` names none of them, or one that is better when lower.
    """
    usable = [name for name in sorted(metrics) if name not in LOWER_IS_BETTER]
    if task.config.metric in LOWER_IS_BETTER and task.main_metric in metrics:
        raise InputError(
            f"task.metric = '{task.main_metric}' is better when lower, and the main metric must be better when higher: "
            f"it chooses the best round and the worst clients. Use one of {', '.join(usable)}; "
            f"'{task.main_metric}' is reported in any case."
        )
    if task.main_metric not in metrics:
        raise InputError(
            f"task.metric = '{task.main_metric}' is no metric of this task on this data."
            f"{nearest(task.main_metric, usable)} Known: {', '.join(usable)}."
        )
    return metrics[task.main_metric]


def split_statistics(statistics: Statistics, sizes: Mapping[Group, int]) -> dict[Group, Statistics]:
    """Cut statistics of concatenated rows back into one part a group (a client, or a named set)."""
    return dict(zip(sizes, _split(statistics, list(sizes.values())), strict=True))


def _split(statistics: Statistics, sizes: Sequence[int]) -> list[Statistics]:
    starts = np.cumsum([0, *sizes])
    return [
        {name: values[start : start + size] for name, values in statistics.items()}
        for start, size in zip(starts, sizes, strict=False)
    ]


def loss_gradients(
    model: AdaptedModel, task: Task, encoded: EncodedRows, rows: np.ndarray, batch_size: int
) -> dict[str, Tensor]:
    """Summed gradient of the loss with respect to each adapted base weight, ``{module: [m, n]}``.

    Each batch's mean loss is weighted by what it is a mean over (:meth:`Task.weight`), so the result does not depend on
    ``batch_size``.
    """
    bases = {name: layer.get_base_layer() for name, layer in model.layers.items()}
    weights: dict[str, Tensor] = {name: base.weight for name, base in bases.items()}  # pyright: ignore
    model.module.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for batch in _batches(rows, batch_size):
            collated = model.to_device(task.collate(encoded, batch))
            (task.loss(model.module, collated) * task.weight(collated)).backward()
        return {
            name: (weight.grad.T if isinstance(bases[name], Conv1D) else weight.grad).clone()  # pyright: ignore
            for name, weight in weights.items()
        }
    finally:
        for weight in weights.values():
            weight.grad = None
        model.own_trainables()


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
