"""Tasks: what the model is asked to do. One file a task."""

from fedlora.tasks import (
    causal_lm,
    classification,
    generation,
    image_classification,
    multiple_choice,
    regression,
    token_classification,
)
from fedlora.tasks.base import Batch, Schema, Statistics, Task, TaskConfig, build_task, collate, register

__all__ = [
    "Batch",
    "Schema",
    "Statistics",
    "Task",
    "TaskConfig",
    "build_task",
    "causal_lm",
    "classification",
    "collate",
    "generation",
    "image_classification",
    "multiple_choice",
    "register",
    "regression",
    "token_classification",
]
