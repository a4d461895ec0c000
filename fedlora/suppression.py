"""One orthogonal adapter for each removal request, mixed in by how much an input looks like the forgotten rows.

After O3 (Gao et al., ICLR 2025, arXiv 2407.10223), with exact orthogonality where O3 has a penalty: request t owns
slice t of one seeded orthonormal matrix per layer, so A_t A_u^T = 0 for t != u; only B_t is trained, and
dW(x) = dW + sum_t s_t(x) B_t A_t. The base model stays as it is: this suppresses what it has learned, and unlearns
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from fedlora.adapters.bases import orthonormal_rows

RANK = 8
"""Rows of each request."""


@dataclass(frozen=True)
class Score:
    """How much features look like those of one client's rows, in [0, 1].

    The posterior of Fisher's discriminant with a shrunken common covariance (Ledoit and Wolf 2004) and equal priors:
    s(x) = sigmoid(w x + b). It sees no labels. A client has few rows for so many dimensions, so its training rows
    score higher than its other rows do.

    Attributes:
        weight: w ``[d]``.
        bias: b.
    """

    weight: Tensor
    bias: float

    @classmethod
    def fit(cls, own: Tensor, others: Tensor) -> Score:
        """Tell the features ``own`` ``[n, d]`` from those of ``others`` ``[k, d]``."""
        features = torch.cat([own, others]).double().numpy()
        which = np.repeat([1, 0], [len(own), len(others)])
        found = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5]).fit(features, which)
        return cls(torch.from_numpy(found.coef_[0]).float(), float(found.intercept_[0]))

    def of(self, features: Tensor) -> Tensor:
        """``[b]`` from features ``[b, d]``."""
        return torch.sigmoid(features @ self.weight + self.bias)


@dataclass(frozen=True)
class Request:
    """What one removal request has added.

    Attributes:
        rows: A by module ``[r, n]``, orthonormal, never trained.
        factors: B by module ``[m, r]``.
        score: where it acts.
    """

    rows: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    score: Score


def rows_of(layers: Mapping[str, Any], request: int, seed: int) -> dict[str, Tensor]:
    """A of the request with this number, by module ``[RANK, n]``: the same however many requests follow."""
    sizes = [RANK] * (request + 1)
    return {
        name: orthonormal_rows(int(layer.in_features), sizes, seed, f"forgotten {name}")[-RANK:]
        for name, layer in layers.items()
    }


def capacity(layers: Mapping[str, Any]) -> int:
    """How many requests have rows in every layer."""
    return min(int(layer.in_features) // RANK for layer in layers.values())


@contextmanager
def suppressed(layers: Mapping[str, nn.Module], requests: Sequence[Request], scores: Tensor) -> Iterator[None]:
    """Inside, every layer adds sum_t s_t(x) x A_t^T B_t^T to what it says.

    Args:
        layers: the adapted layers by module name.
        requests: in order.
        scores: ``[b, requests]`` of the rows of the batch that is run inside.
    """
    handles = [layer.register_forward_hook(_hook(name, requests, scores)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, requests: Sequence[Request], scores: Tensor) -> Any:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].float()
        shares = scores.to(x.device).reshape(len(scores), -1, *[1] * (x.ndim - 1))
        for number, request in enumerate(requests):
            a, b = request.rows[name].to(x.device), request.factors[name].to(x.device)
            output = output + (shares[:, number] * (x @ a.T @ b.T)).to(output.dtype)
        return output

    return add
