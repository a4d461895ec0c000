"""Gradients of many clients from one pass over their batches: each client's own, of its mean loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.client_axis import ClientAxis
from fedlora.encoded import EncodedRows
from fedlora.model import AdaptedModel
from fedlora.tasks import Task


def cohort_gradients(
    model: AdaptedModel,
    axis: ClientAxis,
    task: Task,
    encoded: EncodedRows,
    leaves: State,
    batches: Sequence[np.ndarray],
    size: int,
) -> tuple[State, Tensor]:
    """Gradients of each client's mean loss over its batch.

    Args:
        model: gives what is frozen.
        axis: of the model.
        task: gives the loss.
        encoded: all rows of the data set.
        leaves: each client's tensors ``{key: [clients, ...]}``; those that require gradients are trained.
        batches: the row numbers of each client; never empty.
        size: rows of each client in one forward pass.

    Returns:
        The gradients ``{key: [clients, ...]}`` and the mean losses ``[clients]``.
    """
    device = model.device
    parts = [[b[start : start + size] for b in batches] for start in range(0, max(map(len, batches)), size)]
    collated = [model.to_device(task.collate(encoded, np.concatenate(part))) for part in parts]
    counts = [[len(rows) for rows in part] for part in parts]
    owners = [torch.repeat_interleave(torch.arange(len(part)), torch.tensor(part)).to(device) for part in counts]
    weights = [task.row_weights(batch).to(device, torch.float32) for batch in collated]
    totals = torch.zeros(len(batches), device=device)
    for owner, weight in zip(owners, weights, strict=True):
        totals.index_add_(0, owner, weight)
    totals = totals.clamp(min=1)
    losses = torch.zeros(len(batches), device=device)
    for count, batch, owner in zip(counts, collated, owners, strict=True):
        with axis.weights(leaves, count):
            each = task.row_losses(model.module, batch) / totals[owner]
            each.sum().backward()
        losses.index_add_(0, owner, each.detach())
    trained = {key: leaf for key, leaf in leaves.items() if leaf.requires_grad}
    gradients = {key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in trained.items()}
    return gradients, losses
