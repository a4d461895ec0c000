"""DP-SGD with the model's own layers: the gradients of single records through the hooks of Opacus."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fedlora.encoded import EncodedRows
from fedlora.errors import FedloraError
from fedlora.model import AdaptedModel
from fedlora.packing import differs
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.randomness import Randomness
from fedlora.tasks import Task
from fedlora.training import training_mode


class RecordGradients:
    """The private gradients of one client in one round, through Opacus."""

    def __init__(
        self,
        model: AdaptedModel,
        task: Task,
        encoded: EncodedRows,
        optimizer: torch.optim.Optimizer,
        mechanism: Mechanism,
    ) -> None:
        """Train with ``optimizer`` what requires gradients in ``model`` at a step, on the losses of ``task``."""
        self.model, self.task, self.encoded = model, task, encoded
        self.randomness = mechanism.randomness()
        self.optimizer = _Noised(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.batch,  # pyright: ignore[reportArgumentType]  it divides by it
            randomness=self.randomness,
        )

    def hooked(self) -> AbstractContextManager[None]:
        """Record gradients inside of what requires them now."""
        return hooked(self.model)

    def compute(self, rows: np.ndarray, size: int) -> float | None:
        """Write the clipped and noised gradient of ``rows``, ``size`` of them at a time, into the parameters.

        Without rows it is noise alone, and counts as a step all the same.

        Returns:
            The mean loss, or ``None`` without rows.
        """
        self.optimizer.zero_grad(set_to_none=True)  # what rests in this step has no gradient, not one of zeros
        if len(rows) == 0:
            for parameter in self.optimizer.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
            self.optimizer.pre_step()
            return None
        total = 0.0
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            losses = record_losses(self.model, self.task, self.encoded, part)
            losses.sum().backward()
            total += float(losses.detach().sum())
            last = start + size >= len(rows)
            self.optimizer.signal_skip_step(not last)
            self.optimizer.pre_step()
            if not last:
                self.optimizer.zero_grad()
        return total / len(rows)


class _Noised(DPOptimizer):
    """Opacus's optimiser with noise from a :class:`Randomness`."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, randomness: Randomness, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self._randomness = randomness

    def add_noise(self) -> None:
        """Add noise to the sum of clipped gradients."""
        for parameter in self.params:
            std = self.noise_multiplier * self.max_grad_norm
            noise = self._randomness.normal(parameter.shape, std).to(parameter.device)
            parameter.grad = (parameter.summed_grad + noise).view_as(parameter)  # type: ignore[attr-defined]


@contextmanager
def hooked(model: AdaptedModel) -> Iterator[None]:
    """Record the gradients of single records inside, of what is trained.

    Raises:
        FedloraError: Opacus has no such gradients for a layer.
    """
    live = [m for m in model.module.modules() if not m.training and any(p.requires_grad for p in m.parameters(False))]
    try:
        hooks = GradSampleModule(model.module, loss_reduction="sum")
    except NotImplementedError as error:
        raise FedloraError(f"Opacus refuses a layer ({str(error).splitlines()[0]})") from error
    try:
        for module in live:  # the hooks do nothing in evaluation mode
            module.training = True
        # Opacus wants the records along the first axis. The inputs of the first trained layer need no gradient.
        with model.packer.using(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        for module in live:
            module.training = False
        hooks.remove_hooks()
        for parameter in model.module.parameters():
            for name in ("grad_sample", "summed_grad", "_forward_counter"):
                vars(parameter).pop(name, None)


def record_losses(model: AdaptedModel, task: Task, encoded: EncodedRows, rows: np.ndarray) -> Tensor:
    """The loss of every record ``[rows]``: the mean over what it answers, whatever other records are in the batch."""
    batch = model.to_device(task.collate(encoded, rows))
    weights = task.row_weights(batch).to(model.device, torch.float32)
    return task.row_losses(model.module, batch) / weights.clamp(min=1)


def obstacle(model: AdaptedModel, task: Task, encoded: EncodedRows, rows: np.ndarray) -> str | None:
    """Why Opacus does not give the gradients of single records, or ``None``: measured on a few ``rows``.

    Each record's gradient in a common batch must be what it is alone. What Opacus cannot do (DoRA, adapters of
    embeddings, gradient checkpointing) shows here, before the first round.
    """
    model.own_trainables()
    start = model.read(model.trainable)
    generator = torch.Generator().manual_seed(0)
    model.load({key: value + 0.02 * torch.randn(value.shape, generator=generator) for key, value in start.items()})
    parameters = model.parameters()
    try:
        with training_mode(model.module, 0):
            for module in model.module.modules():
                module.training &= "Dropout" not in type(module).__name__  # it would draw other masks for each record
            alone = [
                torch.autograd.grad(
                    record_losses(model, task, encoded, rows[i : i + 1]).sum(), parameters, allow_unused=True
                )
                for i in range(len(rows))
            ]
            with hooked(model):
                record_losses(model, task, encoded, rows).sum().backward()
                found = [parameter.grad_sample for parameter in parameters]  # type: ignore[attr-defined]
    except (FedloraError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return (
            f"Opacus has no gradients of single records for it ({(str(error) or type(error).__name__).splitlines()[0]})"
        )
    finally:
        for parameter in parameters:
            parameter.grad = None
        model.load(start)
    for key, parameter, each, *own in zip(model.trainable, parameters, found, *alone, strict=True):
        expected = torch.stack([torch.zeros_like(parameter) if g is None else g for g in own])
        if each is None or each.shape != expected.shape or differs(expected, each, model.dtype):
            return f"Opacus gives other gradients of single records for '{key}' than those of each record alone"
    return None
