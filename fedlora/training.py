"""Local training: the steps one client takes on its own rows in one round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.adapters import State
from fedlora.config import ClientConfig
from fedlora.encoded import EncodedRows
from fedlora.errors import FedloraError
from fedlora.model import AdaptedModel
from fedlora.packing import choose
from fedlora.tasks import Batch, Task

if TYPE_CHECKING:
    from fedlora.privacy.mechanism import Mechanism
    from fedlora.privacy.randomness import Randomness


def train_steps(
    model: AdaptedModel,
    task: Task,
    encoded: EncodedRows,
    rows: np.ndarray,
    settings: ClientConfig,
    rng: np.random.Generator,
    learning_rate: Callable[[int, int], float],
    dropout_seed: int,
    moments: Mapping[str, Tensor],
    keys: tuple[str, ...],
    objective: Callable[[nn.Module, Batch], Tensor],
    penalty: Callable[[State], State] | None = None,
    privacy: Mechanism | None = None,
) -> tuple[float, State]:
    """Train the tensors ``keys`` of the model in place on ``rows``.

    Args:
        model: loaded with the state to start from.
        task: gives the loss.
        encoded: all rows of the data set.
        rows: the numbers of this client's training rows.
        settings: batch size, steps, optimiser, clipping and accumulation.
        rng: draws the order of the rows.
        learning_rate: of a step, by its number from 0 and the number of steps.
        dropout_seed: draws the adapter's dropout.
        moments: the optimiser state to continue from, as this function returned it; empty to start anew.
        keys: what is trained.
        objective: the mean loss of a batch, a scalar.
        penalty: gradients that no data enter, from what is trained; added to the others after clipping and noise.
        privacy: DP-SGD instead, with Poisson sampling: ``rng``, ``objective`` and ``max_grad_norm`` play no part then.

    Returns:
        The mean loss over the steps that had rows, and AdamW's moments by ``<key>/<name>`` if ``keep_optimizer`` is
        set.

    Raises:
        FedloraError: a loss is not finite; the message has the step.
    """
    model.own_trainables(keys)
    parameters = dict(zip(keys, model.parameters(keys), strict=True))
    optimizer = _optimizer(list(parameters.values()), settings)
    _load_moments(optimizer, parameters, moments)
    whole = settings.batch_size * settings.grad_accumulation
    losses: list[float] = []
    if privacy is None:
        steps = steps_for(len(rows), whole, settings.local_epochs, settings.local_steps)
        private = None
        batches = batch_order(rows, whole, settings.local_epochs, settings.local_steps, rng)
    else:
        from fedlora.privacy.hooks import RecordGradients  # Opacus takes seconds to import

        steps = privacy.steps
        private = RecordGradients(model, task, encoded, optimizer, privacy)
        batches = poisson_batches(rows, privacy, private.randomness)
    trained: tuple[str, ...] = ()
    with training_mode(model.module, dropout_seed), ExitStack() as hooks:
        for step, batch in enumerate(batches):
            before, trained = trained, model.in_step(step, keys)
            if trained != before:
                model.own_trainables(trained)
                hooks.close()
                if private is not None:
                    hooks.enter_context(private.hooked())
            if private is not None:
                loss = private.compute(batch, settings.batch_size)
            else:
                optimizer.zero_grad()
                loss = _backward(model, task, encoded, batch, settings.batch_size, objective)
                if settings.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
            if loss is not None:
                losses.append(loss)
                if not math.isfinite(loss):
                    raise FedloraError(f"the loss is {loss} at local step {step + 1}")
            if penalty is not None:
                for key, gradient in penalty({key: parameters[key].detach() for key in trained}).items():
                    parameters[key].grad = _sum(parameters[key].grad, gradient)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.step()
    model.assert_trainables(trained)
    return float(np.mean(losses or [0.0])), _moments(optimizer, parameters) if settings.keep_optimizer else {}


def _sum(gradient: Tensor | None, penalty: Tensor) -> Tensor:
    return penalty if gradient is None else gradient + penalty


def _backward(
    model: AdaptedModel,
    task: Task,
    encoded: EncodedRows,
    rows: np.ndarray,
    size: int,
    objective: Callable[[nn.Module, Batch], Tensor],
) -> float:
    """Accumulate the gradient of the mean loss over ``rows``, ``size`` of them at a time; return that mean."""
    parts = [model.to_device(task.collate(encoded, rows[i : i + size])) for i in range(0, len(rows), size)]
    weights = [task.weight(part) for part in parts]
    total = 0.0
    for part, weight in zip(parts, weights, strict=True):
        share = weight / sum(weights)
        loss = objective(model.module, part)
        total += share * float(loss.detach())
        (loss * share if len(parts) > 1 else loss).backward()
    return total


def pack_batches(model: AdaptedModel, task: Task, encoded: EncodedRows, sample: np.ndarray) -> str | None:
    """Let ``model`` skip padding from now on, if its losses and gradients on the rows ``sample`` stay the same.

    Returns:
        Why it runs padded, or ``None``.
    """
    collated = model.to_device(task.collate(encoded, sample))

    def run() -> dict[str, Tensor]:
        loss = task.loss(model.module, collated)
        loss.backward()
        gradients = {f"gradient of {key}": p.grad for key, p in zip(model.trainable, model.parameters(), strict=True)}
        for parameter in model.parameters():
            parameter.grad = None
        return {"loss": loss.detach(), **{key: value for key, value in gradients.items() if value is not None}}

    model.own_trainables()
    with training_mode(model.module, 0):
        return choose(model.packer, run, task.pooled)


def batch_order(
    rows: np.ndarray, batch_size: int, epochs: int, steps: int | None, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of row numbers: a new shuffle each epoch, for ``epochs`` or, when set, exactly ``steps`` steps."""
    per_epoch = math.ceil(len(rows) / batch_size)
    total = epochs * per_epoch if steps is None else steps
    order = rows
    for step in range(total):
        if step % per_epoch == 0:
            order = rng.permutation(rows)
        start = (step % per_epoch) * batch_size
        yield order[start : start + batch_size]


def poisson_batches(rows: np.ndarray, privacy: Mechanism, randomness: Randomness) -> Iterator[np.ndarray]:
    """Batches of row numbers in which each row is with the same probability, for the steps of a round; maybe empty."""
    for _ in range(privacy.steps):
        yield rows[randomness.chosen(len(rows), privacy.sample_rate)]


def steps_for(rows: int, batch_size: int, epochs: int, steps: int | None) -> int:
    """Local steps that :func:`batch_order` takes for a client with ``rows`` rows."""
    return epochs * math.ceil(rows / batch_size) if steps is None else steps


@contextmanager
def training_mode(module: nn.Module, seed: int) -> Iterator[None]:
    """Switch on what only training has, adapter dropout and gradient checkpointing, drawing from ``seed``.

    The rest of the backbone stays in evaluation mode: its dropout is zero and its running statistics are frozen.
    """
    live = [m for m in module.modules() if "Dropout" in type(m).__name__ or getattr(m, "gradient_checkpointing", False)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            for each in live:
                each.training = True
            yield
        finally:
            for each in live:
                each.training = False


def _optimizer(parameters: list[nn.Parameter], settings: ClientConfig) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> State:
    """AdamW's state as plain tensors: ``<key>/step``, ``<key>/exp_avg`` and ``<key>/exp_avg_sq``."""
    return {
        f"{key}/{name}": cast(Tensor, value).cpu().clone()
        for key, parameter in parameters.items()
        for name, value in optimizer.state[parameter].items()
    }


def _load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    for path, value in moments.items():
        key, _, name = path.rpartition("/")
        if key not in parameters:
            continue  # of a factor that rests this round
        place = "cpu" if name == "step" else parameters[key].device
        optimizer.state[parameters[key]][name] = value.to(place, copy=True)
