"""The backbone that a process keeps in memory, so that the trials of a sweep do not load it again.

A trial gets a copy of the modules whose loaded weights lie in the same memory; nothing writes to them, because what is
trained is injected beside them. Whatever the checkpoint lacks (a task head) is drawn anew for each trial.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable
from typing import Any, NamedTuple

import torch
from torch import nn


class Loaded(NamedTuple):
    """A model as its checkpoint has it.

    Attributes:
        module: the model.
        drawn: names of parameters that the checkpoint lacks.
    """

    module: nn.Module
    drawn: frozenset[str]


class Resident:
    """Keeps the model that was asked for last."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._loaded: Loaded | None = None

    def get(self, key: Hashable, load: Callable[[], Loaded]) -> Loaded:
        """The model called ``key``; another one is let go before it is loaded."""
        if self._loaded is None or self._key != key:
            self._key, self._loaded = None, None
            self._loaded, self._key = load(), key
        return self._loaded


def copy_of(loaded: Loaded, seed: int) -> nn.Module:
    """The model with its loaded weights in the same memory, and everything else drawn from ``seed`` in its own.

    Args:
        loaded: a transformers model; its ``_init_weights`` says how a layer starts.
        seed: of what is drawn.
    """
    shared: dict[int, Any] = {}
    for name, parameter in loaded.module.named_parameters():
        if name not in loaded.drawn:
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            shared[id(parameter)]._is_hf_initialized = True  # what transformers leaves as it is
    module = copy.deepcopy(loaded.module, shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _draw(module, loaded.drawn)
    return module


def _draw(module: Any, names: Collection[str]) -> None:
    """Draw the parameters ``names`` layer by layer, as transformers does for a checkpoint that lacks them."""
    own = {name for name, _ in module.named_parameters() if name in names}
    for prefix, layer in module.named_modules():
        if any(f"{prefix}.{name}".lstrip(".") in own for name, _ in layer.named_parameters(recurse=False)):
            layer._is_hf_initialized = False
            with torch.no_grad():
                module._init_weights(layer)
