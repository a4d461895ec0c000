"""Means of states: shares of clients, and sums in fp64 in a fixed order, so that bits depend on nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedlora import wire
from fedlora.adapters import State


def completed(state: State, sent: Mapping[str, Tensor]) -> State:
    """``state`` with everything that a client was sent and did not train, in the order of ``sent``."""
    return state if state.keys() >= sent.keys() else {**sent, **state}


def weights(examples: Sequence[int], weighting: str) -> list[float]:
    """Shares p_k that sum to 1: n_k / sum(n), or 1 / K."""
    counts = [1] * len(examples) if weighting == "uniform" else list(examples)
    total = sum(counts)
    return [count / total for count in counts]


def mean_of_trainers(
    sent: Mapping[str, Tensor],
    states: Sequence[State],
    shares: Sequence[float],
    trained: Sequence[frozenset[str] | None],
) -> State:
    """Each tensor's mean in fp64 over the clients that trained it: sum_k p_k theta_k / sum_k p_k over these clients.

    Args:
        sent: the global state; what no client trained stays as it is.
        states: of the clients, in cohort order.
        shares: p_k.
        trained: the keys that each client trained; ``None``: all.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in sent:
        who = tuple(i for i, keys in enumerate(trained) if keys is None or key in keys)
        groups.setdefault(who, []).append(key)
    means: State = {key: sent[key].double() for key in groups.pop((), [])}
    for who, keys in groups.items():
        total = sum(shares[i] for i in who)
        means |= exact_mean([states[i] for i in who], [shares[i] / total for i in who], keys)
    return {key: means[key] for key in sent}


def exact_mean(states: Sequence[State], shares: Sequence[float], keys: Iterable[str]) -> State:
    """sum_k p_k theta_k of ``keys`` in fp64, summed in the order of ``states``."""
    keys = list(keys)
    first = [states[0][key] for key in keys]
    if not first:
        return {}
    sums = torch.zeros(sum(tensor.numel() for tensor in first), dtype=torch.float64, device=first[0].device)
    for state, share in zip(states, shares, strict=True):
        sums.add_(_flat([state[key] for key in keys]), alpha=share)
    return wire.views(sums, {key: tuple(tensor.shape) for key, tensor in zip(keys, first, strict=True)})


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one dimension: without a copy where they lie one after the other, as those of a reply do."""
    first, size = tensors[0], 0
    start, dtype, width = first.data_ptr(), first.dtype, first.itemsize
    for tensor in tensors:
        if tensor.data_ptr() != start + size * width or tensor.dtype != dtype or not tensor.is_contiguous():
            break
        size += tensor.numel()
    else:
        if first.storage_offset() + size <= first.untyped_storage().nbytes() // width:
            return first.as_strided((size,), (1,))
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
