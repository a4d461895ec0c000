"""Central fine-tuning with PEFT and transformers alone, at its best batch size: no federation, nothing of ours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from simulations.benchmark.batch_size import fastest
from simulations.benchmark.plain import CENTRAL_RATE, Arrays, build_model, train
from simulations.benchmark.serving import Task
from simulations.benchmark.variants import THREADS


def run(task: Task, serve: Callable[..., None]) -> None:
    """Find the best batch size, then serve passes over the pooled rows."""
    torch.set_num_threads(THREADS)
    folder, total = task.prepared.folder, task.prepared.workload.total_rows
    arrays, model, start = Arrays.read(folder), build_model(folder), load_file(folder / "start.safetensors")

    def steps_of(order: np.ndarray, size: int, steps: int) -> float:
        return train(model, arrays, order.reshape(-1, size)[:steps], CENTRAL_RATE)

    size = fastest(total, lambda size, steps: steps_of(arrays.pooled[0], size, steps))
    set_peft_model_state_dict(model, start)
    serve(lambda number: steps_of(arrays.pooled[number - 1], size, total // size), size)
