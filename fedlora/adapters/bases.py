"""Where factors start: the three bases of Fed-SB (B ``[m, r]``, A ``[r, n]``, diagonal of R), LoRA-GA, orthonormal A.

All are computed in fp64 and have the sign of each singular pair fixed, so that two machines agree on them as far as
their linear algebra does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.seeding import torch_generator


class Basis(NamedTuple):
    """left ``[m, r]``, core ``[r]`` (the diagonal of s R at the start), right ``[r, n]``."""

    left: Tensor
    core: Tensor
    right: Tensor


def gradient_basis(gradient: Tensor, rank: int, step: float) -> Basis:
    """LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557): the rank-r SVD of the first AdamW step.

    The first step is dW1 = -step * sign(gradient), with ``gradient`` ``[m, n]`` summed over the public sample.
    Then left @ diag(core) @ right is the best rank-r approximation of dW1.
    """
    left, values, right = _signed_svd(-step * torch.sign(gradient.double()), rank)
    return Basis(*_exact([left, values, right], gradient))


def gradient_factors(gradient: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """LoRA-GA (Wang et al. 2024, arXiv 2407.05000): B ``[m, r]`` and A ``[r, n]`` from the gradient ``[m, n]``.

    A has the leading r right singular vectors, B the left ones that come next, each times ``m^(1/4) / sqrt(gamma)``.
    """
    left, _, right = _signed_svd(gradient.double(), 2 * rank)
    size = gradient.shape[0] ** 0.25 / gamma**0.5
    left, right = _exact([left[:, rank:] * size, right[:rank] * size], gradient)
    return left, right


def weight_basis(weight: Tensor, rank: int) -> Basis:
    """LoRA-XS (Balazy et al. 2024, arXiv 2405.17604): left = U_r S_r, right = V_r^T of W ``[m, n]``; R starts at 0."""
    left, values, right = _signed_svd(weight.double(), rank)
    left, right = _exact([left * values, right], weight)
    return Basis(left, torch.zeros(rank), right)


def seeded_basis(m: int, n: int, rank: int, seed: int, module: str) -> Basis:
    """Orthonormal columns ``[m, r]`` and rows ``[r, n]`` from a QR of seeded Gaussians; R starts at 0."""
    generator = torch_generator(seed, "basis", module)
    left = _orthonormal(torch.randn(m, rank, generator=generator, dtype=torch.float64))
    right = _orthonormal(torch.randn(n, rank, generator=generator, dtype=torch.float64)).T
    return Basis(left.float(), torch.zeros(rank), right.float())


def orthonormal_rows(n: int, sizes: Sequence[int], seed: int, module: str) -> Tensor:
    """Orthonormal rows ``[sum(sizes), n]``, in fp32: the transposed Q of one QR of seeded Gaussians ``[n, ...]``.

    They come in slices of ``sizes`` rows. The first slices are the same however many follow, up to the rounding of
    fp64.
    """
    drawn = [
        torch.randn(size, n, generator=torch_generator(seed, "rows", module, k), dtype=torch.float64)
        for k, size in enumerate(sizes)
    ]
    return _orthonormal(torch.cat(drawn).T).T.contiguous().float()


class OwnRows:
    """Rows ``[each, n]`` of each owner's own in every layer, orthonormal, and orthogonal to all others' rows.

    They are slices of :func:`orthonormal_rows`, computed once for a layer.
    """

    def __init__(self, each: int, common: int = 0) -> None:
        """``each``: rows of an owner; ``common``: rows of a first slice that is nobody's own."""
        self.each, self.common = each, common
        self._known: dict[tuple[int, int, str], Tensor] = {}

    def of(self, place: int, owners: int, n: int, seed: int, module: str) -> Tensor:
        """Those of the owner at ``place`` of ``owners``."""
        return self.all(owners, n, seed, module)[place * self.each : (place + 1) * self.each]

    def all(self, owners: int, n: int, seed: int, module: str) -> Tensor:
        """Those of all owners, one after the other ``[owners each, n]``."""
        key = (owners, seed, module)
        if key not in self._known:
            sizes = [self.common] * (self.common > 0) + [self.each] * owners
            self._known[key] = orthonormal_rows(n, sizes, seed, module)
        return self._known[key][self.common :]


def complementary_rows(weight: Tensor, rank: int, avoid: int, seed: int, module: str) -> Tensor:
    """Orthonormal rows ``[rank, n]``, orthogonal to the ``avoid`` leading right singular vectors of W ``[m, n]``.

    The seeded Gaussians of :func:`orthonormal_rows`, projected before their QR.
    """
    leading = torch.linalg.svd(weight.double(), full_matrices=False).Vh[:avoid]
    drawn = torch.randn(rank, weight.shape[1], generator=torch_generator(seed, "rows", module, 0), dtype=torch.float64)
    drawn = drawn.to(leading)
    return _orthonormal((drawn - drawn @ leading.T @ leading).T).T.float()


def _exact(factors: Sequence[Tensor], source: Tensor) -> list[Tensor]:
    """``factors`` in the type of ``source``, but not in less than fp32, in which they would not be orthonormal."""
    return [factor.to(torch.promote_types(source.dtype, torch.float32)) for factor in factors]


def _orthonormal(columns: Tensor) -> Tensor:
    q, r = torch.linalg.qr(columns)
    return q * torch.sign(torch.diagonal(r))


def _signed_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u)
    return u * sign, s, vh * sign.T
