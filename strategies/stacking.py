"""Clients' LoRA factors side by side: many clients are one client of the sum of their ranks (FLoRA's observation).

With ``B = [p_1 B_1, ..., p_K B_K]`` and ``A = [A_1; ...; A_K]``, ``B @ A`` is the exact ``sum_k p_k B_k A_k``: one
product instead of K. Such stacks are made of a block of clients of one module at a time, so they need little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.adapters.factored import modules_of
from fedlora.adapters.lora import Lora
from fedlora.lowrank import BLOCK, LowRank, RunningSum


def mean_update(
    adapter: Lora,
    states: Sequence[State],
    shares: Sequence[float],
    *,
    around: Mapping[str, Tensor] | None = None,
    seen: Callable[[str, LowRank], LowRank] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, LowRank]:
    """sum_k p_k dW_k of every adapted module, summed in the order of ``states``; see :class:`RunningSum`.

    Args:
        adapter: whose scale s belongs to dW = s B A.
        states: one state for each client, with ``lora_B [m, r_k]`` and ``lora_A [r_k, n]`` of every module.
        shares: p_k of every client.
        around: factors (of one rank for all) that are subtracted from every client's first; ``None``: nothing.
        seen: what of the update of a module is summed, linear in it; ``None``: all.
        dtype: of the products of a block of clients and of the result; blocks are summed in fp64.
    """
    modules = modules_of(states[0])
    ranks = [state[f"{modules[0]}.lora_A.weight"].shape[0] for state in states]
    factors = (adapter.scale * torch.tensor(shares, dtype=torch.float64)).repeat_interleave(torch.tensor(ranks))
    blocks = list(_blocks(ranks))
    mean = {}
    for module in modules:
        running = RunningSum(dtype)
        for clients, columns in blocks:
            stack = _stack(module, states[clients], factors[columns].to(dtype), around)
            running.add(stack if seen is None else seen(module, stack))
        mean[module] = running.value()
    return mean


def _blocks(ranks: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Consecutive clients and their columns, each of at least ``BLOCK`` columns but the last."""
    first = start = end = 0
    for client, rank in enumerate(ranks, 1):
        end += rank
        if end - start >= BLOCK or client == len(ranks):
            yield slice(first, client), slice(start, end)
            first, start = client, end


def _stack(module: str, states: Sequence[State], factors: Tensor, around: Mapping[str, Tensor] | None) -> LowRank:
    key_b, key_a = f"{module}.lora_B.weight", f"{module}.lora_A.weight"
    left, right = torch.cat([state[key_b] for state in states], 1), torch.cat([state[key_a] for state in states], 0)
    if around is not None:
        (m, rank), n = around[key_b].shape, right.shape[1]
        left.view(m, -1, rank).sub_(around[key_b][:, None])
        right.view(-1, rank, n).sub_(around[key_a])
    return LowRank(left.to(factors.dtype).mul_(factors.to(left.device)), right)
