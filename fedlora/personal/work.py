"""The work of a client with a model of its own, counted on the meta device."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedlora.capability import Capability
from fedlora.personal.model import PersonalModel
from fedlora.tasks import Task

ROWS = 2


def flops_per_row(model: PersonalModel, task: Task, picture: tuple[int, int, int]) -> dict[str, float]:
    """FLOPs of one row in one epoch of every phase, forward and backward, for each private model by name.

    Matrix products and convolutions are counted, as PyTorch runs them; the optimiser's work is not.
    """
    batch = {
        "pixel_values": torch.zeros(ROWS, *picture, device="meta"),
        "target": torch.zeros(ROWS, dtype=torch.long, device="meta"),
    }
    found: dict[str, float] = {}
    for name in model.models.models:
        model.models.current = name
        with FlopCounterMode(display=False) as counter:
            for phase in model.phases:
                model.own_trainables(model.in_phase(phase, model.trains(capability=Capability(model=name))))
                phase.objective(task)(model.models, batch).backward()
        found[name] = counter.get_total_flops() / ROWS
    model.own_trainables()
    return found
