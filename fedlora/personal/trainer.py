"""Train clients that have models of their own: one after the other, each in the phases of its adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.adapters import State
from fedlora.adapters.personal import PREFIX, Phase
from fedlora.cohort import Member, Trained
from fedlora.errors import FedloraError
from fedlora.personal.private_models import Outputs, PrivateModels
from fedlora.tasks import Batch, Task
from fedlora.trainer import Trainer
from fedlora.training import train_steps


class PersonalTrainer(Trainer):
    """One client at a time: their models have no layer in common that could run over the rows of several."""

    def share_steps(self, sample: np.ndarray) -> None:
        """Refused, with the reason."""
        self.reason = "every client has a model of its own"

    def train(self, members: Sequence[Member]) -> list[Trained]:
        """Train every member alone."""
        return [self._alone(member) for member in members]

    def _alone(self, member: Member) -> Trained:
        self.model.load(member.state)
        losses, moments = [], {}
        try:
            for phase in self._part.phases():
                loss, kept = self._phase(phase, member)
                losses.append(loss)
                moments |= kept
        except FedloraError as error:
            return Trained({}, math.nan, {}, str(error))
        state = self.model.read(member.state)
        if self._part.summarises:
            state |= self._summary(member.rows)
        return Trained(state, losses[0], moments)

    def _phase(self, phase: Phase, member: Member) -> tuple[float, State]:
        """The steps of one phase; every phase draws the same batches."""
        return train_steps(
            self.model,
            self.task,
            self.rows,
            member.rows,
            self.settings,
            member.rng(),
            member.learning_rate,
            member.dropout_seed,
            member.moments,
            phase.keys(member.keys),
            objective(self.task, phase),
        )

    def _summary(self, rows: np.ndarray) -> State:
        """What travels, from the features of a client's rows after training."""
        features, targets = [], []
        size = self.settings.batch_size
        with torch.no_grad():
            for start in range(0, len(rows), size):
                batch = self.model.to_device(self.task.collate(self.rows, rows[start : start + size]))
                features.append(self.model.module(batch["pixel_values"]).features)
                targets.append(batch["target"])
        summary = self._part.summary(torch.cat(features), torch.cat(targets))
        return {PREFIX + name: value.cpu() for name, value in summary.items()}

    @property
    def _part(self) -> Any:
        return cast(PrivateModels, self.model.module).adapter


def objective(task: Task, phase: Phase) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss of a batch in a phase, a scalar; the task says what the loss of given logits is."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        outputs: Outputs = module(batch["pixel_values"])
        return phase.loss(outputs, lambda logits: task.loss(_Said(logits), batch), batch)

    return loss


class _Said(nn.Module):
    """A model that has already said ``logits``."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Tensor) -> _Said:
        return self
