"""Train many clients at once on one model: the same steps as one after the other, with a client axis.

A cohort holds clients that share everything frozen. In local step s every client that still has a step s puts its batch
into one large batch; its loss, gradient norm, optimiser moments and step count are its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.client_axis import ClientAxis
from fedlora.config import ClientConfig
from fedlora.encoded import EncodedRows
from fedlora.model import AdaptedModel
from fedlora.tasks import Task
from fedlora.training import batch_order, steps_for, training_mode

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of torch.optim.AdamW


@dataclass(frozen=True)
class Member:
    """One client of a cohort.

    Attributes:
        state: every trained tensor to start from.
        rows: the numbers of its training rows.
        rng: draws the order of its rows.
        learning_rate: of a step, by its number from 0 and the number of steps.
        moments: the optimiser state to continue from, or empty.
    """

    state: State
    rows: np.ndarray
    rng: np.random.Generator
    learning_rate: Callable[[int, int], float]
    moments: Mapping[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """What a member has become: its state, mean loss, moments if kept, and the first step with a loss not finite."""

    state: State
    loss: float
    moments: State
    failed_step: int | None
    failed_loss: float


def train_cohort(
    model: AdaptedModel,
    axis: ClientAxis,
    task: Task,
    encoded: EncodedRows,
    settings: ClientConfig,
    members: Sequence[Member],
) -> list[Trained]:
    """Train ``members`` on the model's frozen part; equal to training each alone up to the order of sums."""
    whole = settings.batch_size * settings.grad_accumulation
    steps = [steps_for(len(m.rows), whole, settings.local_epochs, settings.local_steps) for m in members]
    orders = [batch_order(m.rows, whole, settings.local_epochs, settings.local_steps, m.rng) for m in members]
    stacked = {key: torch.stack([m.state[key] for m in members]) for key in model.trainable}
    optimizer = _Optimizer(stacked, members, settings)
    losses = np.full((len(members), max(steps)), np.nan)
    model.own_trainables()
    with training_mode(model.module, 0):
        for step in range(max(steps)):
            batches = [
                next(order) if step < count else np.zeros(0, int) for order, count in zip(orders, steps, strict=True)
            ]
            gradients, found = _gradients(model, axis, task, encoded, stacked, batches, settings.batch_size)
            active = torch.tensor([step < count for count in steps])
            losses[active.numpy(), step] = found[active].numpy()
            rates = torch.tensor([m.learning_rate(min(step, n - 1), n) for m, n in zip(members, steps, strict=True)])
            optimizer.step(gradients, active, rates)
    return [
        _trained({key: value[i] for key, value in stacked.items()}, losses[i, :count], optimizer.moments(i))
        for i, count in enumerate(steps)
    ]


def _trained(state: State, losses: np.ndarray, moments: State) -> Trained:
    odd = np.flatnonzero(~np.isfinite(losses))
    first = int(odd[0]) if len(odd) else None
    return Trained(
        {key: value.clone() for key, value in state.items()},
        float(losses.mean()),
        moments,
        first,
        math.nan if first is None else float(losses[first]),
    )


def _gradients(
    model: AdaptedModel,
    axis: ClientAxis,
    task: Task,
    encoded: EncodedRows,
    stacked: State,
    batches: Sequence[np.ndarray],
    size: int,
) -> tuple[State, Tensor]:
    """Gradients ``{key: [clients, ...]}`` of each client's mean loss over its batch, and those losses ``[clients]``."""
    leaves = {key: value.detach().requires_grad_() for key, value in stacked.items()}
    parts = [[b[start : start + size] for b in batches] for start in range(0, max(map(len, batches)), size)]
    collated = [task.collate(encoded, np.concatenate(part)) for part in parts]
    owners = [torch.repeat_interleave(torch.arange(len(part)), torch.tensor([*map(len, part)])) for part in parts]
    weights = [task.row_weights(batch).to(torch.float32) for batch in collated]
    totals = torch.zeros(len(batches))
    for owner, weight in zip(owners, weights, strict=True):
        totals.index_add_(0, owner, weight)
    totals = totals.clamp(min=1)
    losses = torch.zeros(len(batches))
    for part, batch, owner in zip(parts, collated, owners, strict=True):
        with axis.weights(leaves, torch.tensor([*map(len, part)])):
            each = task.row_losses(model.module, batch) / totals[owner]
        each.sum().backward()
        losses.index_add_(0, owner, each.detach())
    gradients = {key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in leaves.items()}
    return gradients, losses


class _Optimizer:
    """AdamW or SGD over stacked tensors: elementwise the optimiser of each client, with its own count of steps."""

    def __init__(self, stacked: State, members: Sequence[Member], settings: ClientConfig) -> None:
        self.stacked, self.settings = stacked, settings
        first = next(iter(stacked))
        self.count = torch.tensor([float(m.moments.get(f"{first}/step", torch.zeros(()))) for m in members])
        self.first = {key: _stacked(members, key, "exp_avg", value) for key, value in stacked.items()}
        self.second = {key: _stacked(members, key, "exp_avg_sq", value) for key, value in stacked.items()}

    def step(self, gradients: State, active: Tensor, rates: Tensor) -> None:
        """One step of every ``active`` client at its own rate."""
        settings, decay = self.settings, self.settings.weight_decay
        chosen = active.nonzero()[:, 0]
        scale = torch.ones(len(chosen))
        if settings.max_grad_norm is not None:
            squares = torch.stack([g[chosen].flatten(1).norm(dim=1) for g in gradients.values()])
            scale = (settings.max_grad_norm / (squares.norm(dim=0) + 1e-6)).clamp(max=1.0)
        self.count[chosen] += 1
        lr, count = rates[chosen], self.count[chosen]
        for key, value in self.stacked.items():
            wide = (-1, *[1] * (value.ndim - 1))
            g, theta, rate = gradients[key][chosen] * scale.view(wide), value[chosen], lr.view(wide)
            if settings.optimizer == "sgd":
                value[chosen] = theta - rate * (g + decay * theta)
                continue
            m = self.first[key][chosen].lerp(g, 1 - BETAS[0])
            v = BETAS[1] * self.second[key][chosen] + (1 - BETAS[1]) * g.square()
            self.first[key][chosen], self.second[key][chosen] = m, v
            corrected = (v.sqrt() / (1 - BETAS[1] ** count).sqrt().view(wide)).add_(EPSILON)
            value[chosen] = theta * (1 - rate * decay) - rate / (1 - BETAS[0] ** count).view(wide) * m / corrected

    def moments(self, client: int) -> State:
        """What the client keeps, in the form of :func:`fedlora.training.train_steps`."""
        if not self.settings.keep_optimizer:
            return {}
        kept: State = {}
        for key in self.stacked:
            kept[f"{key}/step"] = self.count[client].clone()
            kept[f"{key}/exp_avg"] = self.first[key][client].clone()
            kept[f"{key}/exp_avg_sq"] = self.second[key][client].clone()
        return kept


def _stacked(members: Sequence[Member], key: str, name: str, like: Tensor) -> Tensor:
    zero = torch.zeros(like.shape[1:])
    return torch.stack([m.moments.get(f"{key}/{name}", zero) for m in members])
