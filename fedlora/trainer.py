"""Trains clients on one resident backbone: many at once where their layers have a client axis, else one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.client_axis import ClientAxis
from fedlora.cohort import Member, Trained, member_steps, train_alone, train_cohort
from fedlora.cohort_gradients import cohort_gradients
from fedlora.config import ClientConfig
from fedlora.encoded import EncodedRows
from fedlora.model import AdaptedModel
from fedlora.packing import differs
from fedlora.privacy.canary import Canary
from fedlora.tasks import Task
from fedlora.training import training_mode

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")
"""What PyTorch says on the CPU; on a GPU it raises :class:`torch.OutOfMemoryError`."""


@dataclass(frozen=True)
class Frozen:
    """What a cohort shares beside the backbone.

    Attributes:
        key: a name of the content; equal keys mean equal content.
        factors: frozen adapter tensors (a basis); empty: as the seed made them.
        correction: the base correction ``{module: [m, n]}``.
    """

    key: tuple[str | None, str | None]
    factors: Mapping[str, Tensor]
    correction: Mapping[str, Tensor]


class Trainer:
    """One backbone with an adapter, and the rows; trains whatever members it is given.

    Attributes:
        reason: why members are trained one by one; ``None`` where a cohort shares its steps.
        halved: how often a cohort did not fit the memory and was cut in two.
    """

    def __init__(self, model: AdaptedModel, task: Task, rows: EncodedRows, settings: ClientConfig) -> None:
        """Train on ``model``, which is changed, with the loss of ``task`` on ``rows``."""
        self.model, self.task, self.rows, self.settings = model, task, rows, settings
        self.axis: ClientAxis | None = None
        self.reason: str | None = "the engine trains one client after the other"
        self.halved = 0
        self._watched = False

    def share_steps(self, sample: np.ndarray) -> None:
        """Train cohorts in common steps from now on, if every trained layer has a client axis.

        That it has one is measured: three clients with different tensors on the rows ``sample`` must get the losses
        and gradients that each of them gets alone.
        """
        axis = ClientAxis(self.model)
        self.reason = _obstacle(self.model, self.task, axis) or _deviation(self, axis, sample)
        self.axis = None if self.reason else axis

    def hold(self, frozen: Frozen) -> None:
        """Put what a cohort shares into the model."""
        self.model.load(frozen.factors)
        self.model.set_base_correction(frozen.correction)

    def train(self, members: Sequence[Member]) -> list[Trained]:
        """Train ``members``, in common steps if possible; a cohort that does not fit the memory is cut in two.

        Raises:
            FedloraError: the first private training has not moved what is trained, or has moved something else.
        """
        if self._watched or members[0].privacy is None:
            return self._train(members)
        canary = Canary(self.model)
        trained = self._train(members)
        canary.check(members, trained)
        self._watched = True
        return trained

    def _train(self, members: Sequence[Member]) -> list[Trained]:
        if self.axis is None:
            return [train_alone(self.model, self.task, self.rows, self.settings, member) for member in members]
        try:
            return train_cohort(self.model, self.axis, self.task, self.rows, self.settings, members)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(members) == 1:
                return [Trained({}, math.nan, {}, "memory ran out with one client alone: lower client.batch_size")]
        self.halved += 1
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        ordered = sorted(range(len(members)), key=lambda i: -member_steps(members[i], self.settings))
        middle = len(ordered) // 2
        trained: dict[int, Trained] = {}
        for half in (ordered[:middle], ordered[middle:]):
            trained.update(zip(half, self._train([members[i] for i in half]), strict=True))
        return [trained[i] for i in range(len(members))]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in OUT_OF_MEMORY)


def _obstacle(model: AdaptedModel, task: Task, axis: ClientAxis) -> str | None:
    """Why the clients of this run cannot share a batch, as far as that can be seen without running it."""
    adapter = model.adapter
    if getattr(adapter.config, "dropout", 0.0) or any(
        isinstance(m, torch.nn.Dropout) and m.p > 0
        for layer in model.layers.values()
        for m in layer.modules()  # pyright: ignore
    ):
        return "adapter dropout is drawn for each client"
    if axis.missing:
        return f"'{axis.missing[0]}' is in no layer that has a client axis"
    if type(task).row_losses is Task.row_losses:
        return f"task {type(task).__name__} gives no loss a row"
    return None


def _deviation(trainer: Trainer, axis: ClientAxis, sample: np.ndarray) -> str | None:
    """Why the client axis does not give the numbers of each client alone, or ``None``."""
    model, clients = trainer.model, 3
    start = model.read(model.per_client)
    generator = torch.Generator().manual_seed(0)
    states = [
        {key: (value.cpu() + 0.02 * torch.randn(value.shape, generator=generator)) for key, value in start.items()}
        for _ in range(clients)
    ]
    equal, unequal = [sample[:1]] * clients, [sample[: c + 1] for c in range(clients)]
    axis.vectorise = bool(axis.whole)
    if axis.vectorise and _misfit(trainer, axis, states, equal):
        axis.vectorise = False
    reason = _misfit(trainer, axis, states, unequal)
    model.load(start)
    return None if reason is None else f"adapter {model.adapter.label} {reason}"


def _misfit(trainer: Trainer, axis: ClientAxis, states: list[State], batches: list[np.ndarray]) -> str | None:
    """What is wrong with the losses and gradients of a common step, or ``None``."""
    expected = [_alone(trainer, state, batch) for state, batch in zip(states, batches, strict=True)]
    try:
        found = _together(trainer, axis, states, batches)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return f"refuses a client axis ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    for client, own in enumerate(expected):
        for key, value in own.items():
            if differs(value, found[key][client], trainer.model.dtype):
                return f"has no client axis: '{key}' differs from that of a client alone"
    return None


def _alone(trainer: Trainer, state: State, batch: np.ndarray) -> State:
    """The loss and gradients of one client with the model's own layers."""
    model = trainer.model
    model.load(state)
    model.own_trainables()
    with training_mode(model.module, 0):
        loss = trainer.task.loss(model.module, model.to_device(trainer.task.collate(trainer.rows, batch)))
        gradients = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    known = zip(model.trainable, model.parameters(), gradients, strict=True)
    return {"loss": loss.detach()} | {k: torch.zeros_like(p) if g is None else g for k, p, g in known}


def _together(trainer: Trainer, axis: ClientAxis, states: list[State], batches: list[np.ndarray]) -> State:
    model = trainer.model
    stacked = {key: torch.stack([s[key] for s in states]).to(model.device) for key in model.per_client}
    leaves = {key: value.requires_grad_(key in model.trainable) for key, value in stacked.items()}
    with training_mode(model.module, 0):
        size = max(map(len, batches))
        gradients, losses = cohort_gradients(model, axis, trainer.task, trainer.rows, leaves, batches, size)
    return {"loss": losses, **gradients}
