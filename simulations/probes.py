"""How the aggregation error of a large cohort is measured: through a few random directions instead of whole products.

For a Gaussian ``Z [n, q]`` with variance ``1 / q``, ``||D Z||_F^2`` is an unbiased estimate of ``||D||_F^2``, and
``sum_k p_k B_k (A_k Z)`` costs ``q r (m + n)`` a client instead of ``m n r``. An exact aggregate reads as exact as
before: a difference of zero is zero in every direction, and any other one is seen with probability 1. The error of an
inexact one is read with a standard error below ``1 / sqrt(2 DIRECTIONS)`` = 3.6 % where the modules differ about
equally, less the more components the difference has; 12 % if all of it is one component of one module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.adapters.factored import modules_of
from fedlora.seeding import torch_generator

DIRECTIONS = 384
"""Of all modules together."""
FEWEST = 32
"""Of one module."""
COLUMNS = 2048
"""The sum of the clients' ranks up to which products are cheap enough to be made whole (256 clients of rank 8)."""


def probes(states: Sequence[State], seed: int) -> dict[str, Tensor]:
    """``{module: Z [n, q]}`` for the clients' LoRA factors, the same for one seed; empty where products are made whole.

    That is in small cohorts, and for models so small or with so few modules that directions would save nothing.
    """
    modules = modules_of(states[0])
    if sum(state[f"{modules[0]}.lora_A.weight"].shape[0] for state in states) <= COLUMNS:
        return {}
    directions = max(FEWEST, -(-DIRECTIONS // len(modules)))
    shapes = {
        module: (states[0][f"{module}.lora_B.weight"].shape[0], states[0][f"{module}.lora_A.weight"].shape[1])
        for module in modules
    }
    if any(2 * directions * (m + n) > m * n for m, n in shapes.values()):
        return {}
    return {
        module: torch.randn(n, directions, generator=torch_generator(seed, "aggregation error", module))
        / directions**0.5
        for module, (_, n) in shapes.items()
    }
