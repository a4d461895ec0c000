"""The work of a client with a model of its own, counted on the meta device."""

from __future__ import annotations

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from fedlora.capability import Capability
from fedlora.encoded import EncodedRows
from fedlora.personal.model import PersonalModel
from fedlora.tasks import Task


def flops_per_token(model: PersonalModel, task: Task, rows: EncodedRows, sample: np.ndarray) -> dict[str, float]:
    """FLOPs of one token in one epoch of every phase, forward and backward, for each private model by name.

    A picture counts as one token. Matrix products and convolutions are counted on the rows ``sample``, as PyTorch runs
    them; the optimiser's work is not.
    """
    batch = {name: values.to("meta") for name, values in task.collate(rows, sample).items()}
    tokens = len(sample) * int(rows.lengths(sample).max())
    found: dict[str, float] = {}
    for name in model.models.models:
        model.models.current = name
        with FlopCounterMode(display=False) as counter:
            for phase in model.phases:
                model.own_trainables(model.in_phase(phase, model.trains(capability=Capability(model=name))))
                phase.objective(task)(model.models, batch).backward()
        found[name] = counter.get_total_flops() / tokens
    model.own_trainables()
    return found
