"""Exact arithmetic on low-rank weight updates, the one place where federated LoRA's mathematics lives.

An adapter's update of one weight is ``dW = left @ right`` with ``left [m, r]`` and ``right [r, n]`` (LoRA: Hu et al.,
2021, ``left = s B`` and ``right = A``; the scale ``s`` is already inside). Sums and means of such updates are exact
concatenations along the rank, so nothing has to be densified to aggregate clients:

- FLoRA (Wang et al., 2024) is ``LowRank.mean(...)``;
- FlexLoRA (Bai et al., 2024) is ``LowRank.mean(...).truncate(r)``;
- the FedEx-LoRA residual (Singhal et al., 2025) is ``LowRank.mean(...) - averaged_factors``.

Linear operations keep the dtype and work on any device, ``meta`` included (there only shapes exist). Operations that
measure or decompose compute in fp64 whatever the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ``dW [m, n] = left @ right`` of one weight with m output and n input features.

    Args:
        left: ``[m, r]``.
        right: ``[r, n]``; r may be 0 (no update) and may exceed ``min(m, n)`` (the sum of many clients).

    Raises:
        ValueError: The factors are not two matrices that can be multiplied.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        """Refuse factors whose product does not exist."""
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"a low-rank update needs left [m, r] and right [r, n], "
                f"got {list(self.left.shape)} and {list(self.right.shape)}"
            )

    @classmethod
    def zeros(
        cls, m: int, n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LowRank:
        """Return the zero update of an ``[m, n]`` weight, of rank 0."""
        return cls(torch.empty(m, 0, dtype=dtype, device=device), torch.empty(0, n, dtype=dtype, device=device))

    @classmethod
    def sum(cls, deltas: Sequence[LowRank]) -> LowRank:
        """Return the exact sum as one concatenation: left ``[m, sum of r_k]``, right ``[sum of r_k, n]``.

        Raises:
            ValueError: There is nothing to sum, or the shapes of the updates differ.
        """
        if not deltas:
            raise ValueError("the sum of no updates has no shape; give at least one update")
        for index, delta in enumerate(deltas):
            if delta.shape != deltas[0].shape:
                raise ValueError(
                    f"update {index} has shape {list(delta.shape)}, update 0 has {list(deltas[0].shape)}; "
                    "only updates of the same weight can be combined"
                )
        return cls(torch.cat([delta.left for delta in deltas], 1), torch.cat([delta.right for delta in deltas], 0))

    @classmethod
    def mean(cls, deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        """Return the weighted mean ``sum_k p_k dW_k`` with ``p_k = weights_k / sum(weights)``, exactly.

        This is the stacking of FLoRA (Wang et al., 2024): the updates are concatenated along the rank and each p_k
        multiplies the left factor only (on both factors it would count as p_k squared).

        Raises:
            ValueError: The updates are none or of unequal shapes, the numbers of updates and weights differ, or the
                weights are negative, not finite or sum to 0.
        """
        shares = _shares(weights, len(deltas))
        return cls.sum([delta.scale(share) for delta, share in zip(deltas, shares, strict=True)])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape ``(m, n)`` of the weight that is updated."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """The inner dimension r: an upper bound of the rank of dW."""
        return self.left.shape[1]

    def factored_size(self) -> int:
        """How many numbers the two factors hold: ``r (m + n)``."""
        return self.rank * sum(self.shape)

    def dense_size(self) -> int:
        """How many numbers dW holds when multiplied out: ``m n``."""
        return math.prod(self.shape)

    def dense(self) -> Tensor:
        """Multiply out to dW ``[m, n]``."""
        return self.left @ self.right

    def scale(self, factor: float) -> LowRank:
        """Return ``factor * dW``; the factor is folded into ``left``."""
        return LowRank(self.left * factor, self.right)

    def __add__(self, other: LowRank) -> LowRank:
        """Return the exact sum, of rank ``self.rank + other.rank``; ValueError when the shapes differ."""
        return LowRank.sum([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        """Return the exact difference, of rank ``self.rank + other.rank``; ValueError when the shapes differ."""
        return self + other.scale(-1.0)

    def inner(self, other: LowRank) -> float:
        """Return the Frobenius inner product ``<dW, dW'>`` from the two ``[r, r']`` Gram matrices.

        ``<L R, L' R'> = tr(Rᵀ Lᵀ L' R') = sum((Lᵀ L') * (R R'ᵀ))``.

        Raises:
            ValueError: The shapes differ.
        """
        if self.shape != other.shape:
            raise ValueError(f"no inner product of updates of shapes {list(self.shape)} and {list(other.shape)}")
        left_gram = self.left.double().T @ other.left.double()
        right_gram = self.right.double() @ other.right.double().T
        return (left_gram * right_gram).sum().item()

    def norm(self) -> float:
        """Return ``‖dW‖_F`` with an error of fp64 rounding relative to the factors' size, however much cancels.

        With the triangles of ``left = Q_L T_L`` and ``rightᵀ = Q_R T_R``, ``‖dW‖_F = ‖T_L T_Rᵀ‖_F``: unlike the
        square root of ``inner(self, self)``, no square of a large number is subtracted from another.
        """
        left, right = self.left.double(), self.right.double()
        if self.rank < min(self.shape):
            left, right = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right.T, mode="r").R.T
        return (left @ right).norm().item()

    def distance(self, other: LowRank) -> float:
        """Return ``‖dW − dW'‖_F``, accurate also when the two are nearly equal; ValueError when the shapes differ."""
        return (self - other).norm()

    def truncate(self, rank: int) -> LowRank:
        """Return the best approximation of dW of at most the given rank (Eckart and Young, 1936).

        QR of both factors reduces the SVD to an ``[r, r]`` one; each new factor gets the square root of the singular
        values, so that neither dwarfs the other in half precision. The result has rank ``min(rank, r, m, n)`` and the
        dtype of the factors.

        Raises:
            ValueError: ``rank`` is negative.
        """
        if rank < 0:
            raise ValueError(f"cannot truncate to rank {rank}; give 0 or more")
        left, right = self.left.double(), self.right.double()
        if self.rank >= min(self.shape):
            u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
        else:
            left_basis, left_triangle = torch.linalg.qr(left)
            right_basis, right_triangle = torch.linalg.qr(right.T)
            u, s, vh = torch.linalg.svd(left_triangle @ right_triangle.T)
            u, vh = left_basis @ u, vh @ right_basis.T
        root = s[:rank].sqrt()
        return LowRank((u[:, :rank] * root).to(self.left.dtype), (root[:, None] * vh[:rank]).to(self.right.dtype))


def weighted_mean(deltas: Sequence[Mapping[str, LowRank]], weights: Sequence[float]) -> dict[str, LowRank]:
    """Return the exact weighted mean of every module's update, each as one concatenation (:meth:`LowRank.mean`).

    Args:
        deltas: One mapping from module name to update for each client.
        weights: One weight for each client, for example its number of samples; normalised here.

    Raises:
        ValueError: The clients update different weights, or :meth:`LowRank.mean` refuses the weights.
    """
    _shares(weights, len(deltas))
    for client in deltas[1:]:
        _require_same_weights(deltas[0], client)
    return {name: LowRank.mean([client[name] for client in deltas], weights) for name in deltas[0]}


def relative_distance(expected: Mapping[str, LowRank], actual: Mapping[str, LowRank]) -> float:
    """Return ``‖expected − actual‖_F / ‖expected‖_F`` over all modules together.

    With ``expected = weighted_mean(clients, weights)`` and ``actual`` the aggregate's update this is the aggregation
    error. It is 0 when both are zero and infinite when only ``expected`` is.

    Raises:
        ValueError: The two update different modules, or one of the same name with different shapes.
    """
    _require_same_weights(expected, actual)
    gaps, sizes = [], []
    for name, delta in expected.items():
        if delta.rank < min(delta.shape):
            gaps.append(delta.distance(actual[name]))
            sizes.append(delta.norm())
        else:  # a mean over many clients: the product is the whole cost, so multiply out once for both numbers
            dense = delta.left.double() @ delta.right.double()
            other = actual[name]
            gaps.append((dense - other.left.double() @ other.right.double()).norm().item())
            sizes.append(dense.norm().item())
    gap, size = math.hypot(*gaps), math.hypot(*sizes)
    if size == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return gap / size


def _shares(weights: Sequence[float], count: int) -> list[float]:
    """Return the weights divided by their sum, after checking that they describe a mean of ``count`` updates."""
    if count == 0 or len(weights) != count:
        raise ValueError(f"a mean needs one weight for each update and at least one, got {count} and {len(weights)}")
    total = math.fsum(weights)
    if not (0.0 < total < math.inf and min(weights) >= 0.0):
        raise ValueError(f"the weights of a mean must be finite, not negative, and sum to more than 0, got {weights}")
    return [weight / total for weight in weights]


def _require_same_weights(first: Mapping[str, LowRank], second: Mapping[str, LowRank]) -> None:
    """Refuse two sets of updates that do not belong to the same weights."""
    if odd := sorted(first.keys() ^ second.keys()):
        raise ValueError(f"both sides must update the same modules; only one of them updates {', '.join(odd)}")
    for name, delta in first.items():
        if second[name].shape != delta.shape:
            raise ValueError(f"module {name}: one update is {list(delta.shape)}, the other {list(second[name].shape)}")
