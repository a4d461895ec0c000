"""Train clients that have models of their own: one after the other, each in the phases of its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from fedlora.adapters import State
from fedlora.adapters.personal import PREFIX
from fedlora.cohort import Member, Trained
from fedlora.personal.private_models import PrivateModels
from fedlora.trainer import Trainer


class PersonalTrainer(Trainer):
    """One client at a time: their models have no layer in common that could run over the rows of several."""

    def share_steps(self, sample: np.ndarray) -> None:
        """Refused, with the reason."""
        self.reason = "every client has a model of its own"

    def train(self, members: Sequence[Member]) -> list[Trained]:
        """Train every member alone, and add what its shared part computes from its rows."""
        return [self._summarised(member, super(PersonalTrainer, self).train([member])[0]) for member in members]

    def _summarised(self, member: Member, trained: Trained) -> Trained:
        if trained.failure or not self._part.summarises:
            return trained
        return replace(trained, state=trained.state | self._summary(member.rows))

    def _summary(self, rows: np.ndarray) -> State:
        """What travels, from the features of a client's rows after training."""
        features, targets = [], []
        size = self.settings.batch_size
        with torch.no_grad():
            for start in range(0, len(rows), size):
                batch = self.model.to_device(self.task.collate(self.rows, rows[start : start + size]))
                features.append(self.model.module(**self.task.inputs(batch)).features)
                targets.append(batch["target"])
        summary = self._part.summary(torch.cat(features), torch.cat(targets))
        return {PREFIX + name: value.cpu() for name, value in summary.items()}

    @property
    def _part(self) -> Any:
        return cast(PrivateModels, self.model.module).adapter
