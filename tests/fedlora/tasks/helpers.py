"""What the tests of tasks share: a task on a folder, a random architecture, and its untouched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora.backbone import Backbone
from fedlora.config import BackboneConfig
from fedlora.tasks import Batch, Schema, Task, build_task


def task_on(folder: Path, name: str, *, tokenizer: Path | None = None, **settings: Any) -> Task:
    """The task ``name`` on the model in ``folder``, with the tokenizer of another folder if one is given."""
    words = str(tokenizer) if tokenizer else None
    return build_task(
        {"name": name, **settings},
        Backbone.from_config(BackboneConfig(name="hf", path=str(folder), tokenizer=words)),
    )


def task_on_random(architecture: str, shape: dict[str, Any], name: str, **settings: Any) -> Task:
    """The task ``name`` on an architecture of ``shape`` with weights drawn from the seed."""
    config = BackboneConfig(name="random", architecture=architecture, settings=shape)
    return build_task({"name": name, **settings}, Backbone.from_config(config))


def model_of(task: Task, schema: Schema, scale: float = 0.5) -> nn.Module:
    """The task's model without an adapter, its matrices drawn anew so large that predictions differ between rows."""
    model = task.backbone.load(task.auto_class, seed=0, **task.model_overrides(schema))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def inputs_of(batch: Batch) -> Batch:
    """What of a batch a text model takes."""
    return {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
