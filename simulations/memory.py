"""Memory of a run: predicted from one training and one evaluation step on the meta device, and measured afterwards."""

from __future__ import annotations

import re
import resource
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedlora.backbone import BYTES_PER_WEIGHT
from fedlora.federation import Federation
from fedlora.model import AdaptedModel
from fedlora.precision import DTYPES, settled_precision
from fedlora.tasks import Batch
from fedlora.tasks.causal_lm import CausalLM
from fedlora.training import training_mode

MOMENTS = {"adamw": 2, "sgd": 0}
TYPICAL_TOKENS = 2048
"""Tokens of a common step where ``engine.tokens`` is to be measured."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive at once; works on the meta device, where they take no memory."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Ignore the storages of ``known`` (the weights)."""
        super().__init__()
        self._alive: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def weight_bytes(federation: Federation, model: AdaptedModel) -> int:
    """Bytes of all weights in memory: fp32, or linear layers quantised."""
    each = BYTES_PER_WEIGHT[federation.config.backbone.quantization]
    plain = DTYPES[settled_precision(federation.config.precision)].itemsize
    head = {id(getattr(model.module, "get_output_embeddings", lambda: None)())}
    quantised = [m for m in model.module.modules() if isinstance(m, nn.Linear) and id(m) not in head]
    linear = sum(m.weight.numel() for m in quantised if not m.weight.requires_grad)
    everything = sum(parameter.numel() for parameter in model.module.parameters())
    if federation.config.backbone.quantization == "none":
        return plain * everything
    return round(plain * (everything - linear) + each * linear)


def step_bytes(federation: Federation, model: AdaptedModel) -> int:
    """Most bytes alive in a local step on the longest training rows: activations, gradients and optimiser moments."""
    settings = federation.config.client
    sizes = dict(zip(model.trainable, (parameter.numel() for parameter in model.parameters()), strict=True))
    kinds = {federation.capability(client) for client in federation.clients}
    trainable = max(sum(model.held(sizes, kind).values()) for kind in kinds)
    rows = np.concatenate(list(federation.index.train.values()))
    clients = clients_in_step(federation, rows)
    state = trainable * (1 + MOMENTS[settings.optimizer])
    if clients > 1:  # each with tensors of its own beside the model's, and their gradients at once
        state += 2 * trainable
    size = _padded_rows(federation, model, rows, settings.batch_size * clients)
    return _backward_bytes(federation, model, rows, size) + 4 * clients * state


def _padded_rows(federation: Federation, model: AdaptedModel, rows: np.ndarray, size: int) -> int:
    """As how many of the longest rows a batch of ``size`` counts: all, or by its real tokens where it is packed."""
    lengths = federation.rows.lengths(rows)
    if not (federation.config.engine.packing and federation.rows.ragged and model.packer.blocks is not None):
        return size
    most = size * lengths.mean() + 2 * np.sqrt(size) * lengths.std()  # few batches are larger
    return min(size, max(1, round(most / lengths.max())))


def clients_in_step(federation: Federation, rows: np.ndarray) -> int:
    """Clients that share a step on average: 1, but on the engine ``cohort``, which ``auto`` means here too."""
    config = federation.config
    if config.engine.name not in ("auto", "cohort") or federation.backbone.client_models is not None:
        return 1
    each = config.client.batch_size * float(federation.rows.lengths(rows).mean())
    cohort = min(config.cohort.size or len(federation.clients), len(federation.clients))
    return max(1, min(cohort, round((config.engine.tokens or TYPICAL_TOKENS) / each)))


def basis_bytes(federation: Federation, model: AdaptedModel) -> int:
    """Most bytes alive while gradients of the adapted weights are taken and summed; 0 where an adapter needs none."""
    index, settings, asked = federation.index, federation.config, 0
    if federation.adapter.needs_public_sample:
        rows, size = index.public, settings.eval.batch_size
    elif federation.adapter.needs_client_gradients:
        rows, size = np.concatenate(list(index.train.values())), settings.client.batch_size
        asked = min(settings.cohort.size or len(federation.clients), len(federation.clients))
    else:
        return 0
    adapted = sum(int(layer.get_base_layer().weight.numel()) for layer in model.layers.values())  # pyright: ignore
    return 4 * adapted * (1 + asked) + _backward_bytes(federation, model, rows, size)


def _backward_bytes(federation: Federation, model: AdaptedModel, rows: np.ndarray, size: int) -> int:
    batch = _longest(federation, model, rows, size)
    with LiveBytes(_tensors(model.module)) as live, training_mode(model.module, 0):
        federation.task.loss(model.module, batch).backward()
    for parameter in model.parameters():
        parameter.grad = None
    return live.peak


def evaluation_bytes(federation: Federation, model: AdaptedModel) -> int:
    """Most bytes alive while the longest evaluation rows go through the model."""
    index, settings = federation.index, federation.config.eval
    rows = np.concatenate([*index.validation.values(), *index.unseen.values(), *index.test.values()])
    if len(rows) == 0:
        return 0
    batch = _longest(federation, model, rows, settings.batch_size)
    with torch.no_grad(), LiveBytes(_tensors(model.module)) as live:
        federation.task.loss(model.module, batch)
    return live.peak


def predicted_peak(federation: Federation, model: AdaptedModel, weights: int, step: int) -> int:
    """Peak resident memory of the process that runs the loop engine.

    What this process holds already (the interpreter, the libraries, the data), the weights, and the largest of a
    training step, an evaluation step and a gradient of the public sample; while weights are read, the pages of their
    file count beside them. Writing a merged model (``--merged``) needs the weights once more.

    Args:
        federation: the run.
        model: its model on the meta device.
        weights: :func:`weight_bytes` of them.
        step: :func:`step_bytes` of them.
    """
    working = max(step, evaluation_bytes(federation, model), basis_bytes(federation, model), weights)
    return psutil.Process().memory_info().rss + weights + working


def measured_peak() -> int:
    """Peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: what getrusage says there includes the process that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _longest(federation: Federation, model: AdaptedModel, rows: np.ndarray, size: int) -> Batch:
    """The longest of ``rows`` as a batch on the device of ``model``, the meta device where it can be built there.

    Without its attention mask, which transformers looks into: the same memory but for the mask itself. The labels of a
    language model stay where their values can be read: they say where the vocabulary is scored.
    """
    longest = rows[np.argsort(federation.rows.lengths(rows), kind="stable")[-size:]]
    batch = federation.task.collate(federation.rows, longest)
    device = next(model.module.parameters()).device
    kept = ("labels",) if isinstance(federation.task, CausalLM) else ()
    return {n: values if n in kept else values.to(device) for n, values in batch.items() if n != "attention_mask"}


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
