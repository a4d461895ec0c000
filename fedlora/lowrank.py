"""Exact arithmetic on low-rank weight updates, the one place where federated LoRA's mathematics lives.

An adapter's update of one weight is ``dW = left @ right`` with ``left [m, r]`` and ``right [r, n]`` (LoRA: Hu et al.,
2021, ``left = s B`` and ``right = A``; the scale ``s`` is already inside). Sums and means of such updates are exact
concatenations along the rank, so nothing has to be densified to aggregate clients:

- FLoRA (Wang et al., 2024) is ``LowRank.mean(...)``, or :func:`weighted_mean` over all modules;
- FlexLoRA (Bai et al., 2024) is ``LowRank.mean(...).truncate(r)``;
- the FedEx-LoRA residual (Singhal et al., 2025) is ``LowRank.mean(...) - averaged_factors``.

Linear operations keep the dtype and work on any device, ``meta`` included (there only shapes exist). Operations that
measure or decompose compute in fp64 whatever the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
        """Multiply out to dW ``[m, n]``; the identity of :func:`as_factors` costs nothing."""
        m, n = self.shape
        if self.rank == min(m, n) and not self.left.is_meta:
            identity, dense = (self.left, self.right) if m <= n else (self.right, self.left)
            if torch.equal(identity, torch.eye(min(m, n), dtype=identity.dtype, device=identity.device)):
                return dense.clone()
        return self.left @ self.right

    def double(self) -> LowRank:
        """The same update in fp64."""
        return LowRank(self.left.double(), self.right.double())

    def scale(self, factor: float) -> LowRank:
        """Return ``factor * dW``; the factor is folded into ``left``."""
        return LowRank(self.left * factor, self.right)

    def __add__(self, other: LowRank) -> LowRank:
        """Return the exact sum, of rank ``self.rank + other.rank``; ValueError when the shapes differ."""
        return LowRank.sum([self, other])

    def __sub__(self, other: LowRank) -> LowRank:
        """Return the exact difference, of rank ``self.rank + other.rank``; ValueError when the shapes differ."""
        return self + other.scale(-1.0)

    def through(self, directions: Tensor) -> LowRank:
        """Return ``dW @ Z`` for ``Z [n, q]``, an update of an ``[m, q]`` weight, in the dtype of the factors.

        Summed in pieces, so that the rounding of fp32 stays near 2e-7.
        """
        return LowRank(self.left, _in_pieces(self.right, directions.to(self.right)))

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
        dtype of the factors. A few components of a large dense dW come from the eigenvectors of its Gram matrix, which
        differs from the best error by less than 1e-7 of ``‖dW‖_F`` (the square root of fp64's rounding).

        Raises:
            ValueError: ``rank`` is negative.
        """
        if rank < 0:
            raise ValueError(f"cannot truncate to rank {rank}; give 0 or more")
        left, right = self.left.double(), self.right.double()
        if self.rank >= min(self.shape):
            u, s, vh = _leading_components(self.double().dense(), rank)
        else:
            left_basis, left_triangle = torch.linalg.qr(left)
            right_basis, right_triangle = torch.linalg.qr(right.T)
            u, s, vh = torch.linalg.svd(left_triangle @ right_triangle.T)
            u, vh = left_basis @ u, vh @ right_basis.T
        root = s[:rank].sqrt()
        return LowRank((u[:, :rank] * root).to(self.left.dtype), (root[:, None] * vh[:rank]).to(self.right.dtype))


BLOCK = 1024
"""The rank at which a sum that is multiplied out already takes in further factors, and of a stack of clients."""
PIECE = 128
"""The length of fp32 sums where shorter ones cost little: the error of a sum grows with the root of its length."""
GRAM_FROM = 64
"""The smaller side of a dense dW from which a few leading components are cheaper by eigenvectors than by an SVD."""


class RunningSum:
    """The exact sum of updates of one weight, in memory that does not grow with how many there are.

    Factors lie side by side until they hold more numbers than dW does; then they are multiplied out, and the sum is
    held as ``I @ dW``. Updates that follow each other with the very same right factor (a frozen A) share it in the sum
    too. Sums are made in fp64, and their order decides the bits, nothing else does.

    Args:
        dtype: of the products of a block of factors and of the result: fp64 (2e-16), or fp32 at half the cost (2e-7;
            blocks are summed in fp64, so it does not grow with their number).
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts: list[tuple[Tensor, Tensor, float]] = []
        self._rank = 0
        self._shape: tuple[int, int] | None = None
        self._dense: Tensor | None = None

    def add(self, delta: LowRank, factor: float = 1.0) -> None:
        """Add ``factor * dW``.

        Raises:
            ValueError: The shape differs from that of the updates before.
        """
        shape = delta.shape
        if shape != (self._shape or shape):
            raise ValueError(f"an update of shape {list(shape)} cannot be added to {list(self._shape or ())}")
        self._shape = shape
        if self._parts and delta.right is self._parts[-1][1]:
            left, right, before = self._parts[-1]
            total = left.double() * before if before != 1.0 or left.dtype != torch.float64 else left
            self._parts[-1] = (total.add(delta.left, alpha=factor), right, 1.0)
            return
        self._parts.append((delta.left, delta.right, factor))
        self._rank += delta.rank
        if self._rank >= min(shape) or (self._dense is not None and self._rank >= BLOCK):
            self._multiply_out()

    def value(self) -> LowRank:
        """The sum.

        Raises:
            ValueError: Nothing was added.
        """
        if self._shape is None:
            raise ValueError("the sum of no updates has no shape; give at least one update")
        if self._dense is None:
            return LowRank(*self._factors())
        self._multiply_out()
        return as_factors(self._dense.to(self._dtype))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The parts side by side, with their factors in ``left``."""
        lefts, rights, factors = zip(*self._parts, strict=True)
        if factors == (1.0,):
            return lefts[0].to(self._dtype), rights[0].to(self._dtype)
        columns = [factor for part, factor in zip(lefts, factors, strict=True) for _ in range(part.shape[1])]
        left = torch.cat(lefts, 1).to(self._dtype) * torch.tensor(columns, dtype=self._dtype, device=lefts[0].device)
        return left, torch.cat(rights, 0).to(self._dtype)

    def _multiply_out(self) -> None:
        if self._parts:
            left, right = self._factors()
            narrow = min(left.shape[0], right.shape[1]) <= PIECE
            product = _in_pieces(left, right) if narrow else left @ right
            self._dense = product.double() if self._dense is None else self._dense.add_(product)
            self._parts, self._rank = [], 0


def as_factors(dense: Tensor) -> LowRank:
    """The update ``dW [m, n]`` as the trivial product with an identity, of rank ``min(m, n)``."""
    m, n = dense.shape
    identity = torch.eye(min(m, n), dtype=dense.dtype, device=dense.device)
    return LowRank(identity, dense) if m <= n else LowRank(dense, identity)


def weighted_mean(
    deltas: Iterable[Mapping[str, LowRank]], weights: Sequence[float], dtype: torch.dtype | None = None
) -> dict[str, LowRank]:
    """Return the exact weighted mean of every module's update (:class:`RunningSum`).

    Args:
        deltas: One mapping from module name to update for each client; they are looked at one after the other, so a
            generator need not hold them all.
        weights: One weight for each client, for example its number of samples; normalised here.
        dtype: Of products and result; ``None``: that of the first client's factors.

    Raises:
        ValueError: The clients update different weights, or the weights do not describe a mean.
    """
    shares = _shares(weights, len(weights))
    sums: dict[str, RunningSum] = {}
    first: Mapping[str, LowRank] = {}
    count = 0  # stays so without clients
    for count, client in enumerate(deltas, 1):
        if count == 1:
            first, sums = client, {name: RunningSum(dtype or delta.left.dtype) for name, delta in client.items()}
        if count > len(shares):
            break
        if client.keys() != first.keys():
            _require_same_weights(first, client)
        for name, delta in client.items():
            sums[name].add(delta, shares[count - 1])
    _shares(weights, count)
    return {name: running.value() for name, running in sums.items()}


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
            dense = delta.double().dense()
            gaps.append((dense - actual[name].double().dense()).norm().item())
            sizes.append(dense.norm().item())
    gap, size = math.hypot(*gaps), math.hypot(*sizes)
    if size == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return gap / size


def _in_pieces(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, summed over pieces of ``PIECE`` columns first."""
    pieces = zip(left.split(PIECE, 1), right.split(PIECE), strict=True)
    return torch.stack([columns @ rows for columns, rows in pieces]).sum(0)


def _leading_components(dense: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least the ``rank`` leading singular vectors and values ``u, s, vh`` of a matrix in fp64."""
    m, n = dense.shape
    if min(m, n) < max(GRAM_FROM, 4 * rank):
        return torch.linalg.svd(dense, full_matrices=False)
    if m > n:
        u, s, vh = _leading_components(dense.T, rank)
        return vh.T, s, u.T
    basis = torch.linalg.eigh(dense @ dense.T).eigenvectors[:, m - rank :]  # in the order of rising eigenvalues
    u, s, vh = torch.linalg.svd(basis.T @ dense, full_matrices=False)
    return basis @ u, s, vh


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
