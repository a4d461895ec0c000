"""Tasks: what the model is asked to do. One file a task."""

from fedlora.tasks import causal_lm, classification, regression
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
    "register",
    "regression",
]
