"""FedSVD (Lee et al., NeurIPS 2025, arXiv 2505.12805): B is averaged, then B A gets new factors with orthonormal A.

With A frozen and common, the mean of B is exact. Every ``refresh`` rounds the server writes the product as
``B A = U S V^T`` (rank r, so nothing is lost) and goes on with ``A = V^T`` and ``B = U S``. A has changed then, and
every client must get it: those bytes are counted as setup. Where the update is still zero A stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.adapters import State
from fedlora.adapters.factored import modules_of
from fedlora.adapters.ffa import FrozenALora
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Reply, Server, weighted_mean


class FedSVD(FederatedStrategy):
    """Exact; the refactoring changes how the update is written, not the update."""

    exact: ClassVar[bool | None] = True

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples", refresh: int = 1) -> None:
        """``refresh``: rounds between two refactorings."""
        super().__init__(weighting)
        if refresh < 1:
            raise InputError(f"strategy.refresh = {refresh} is not valid: give the rounds between two refactorings.")
        self.refresh = refresh
        self._frozen: State = {}
        self._changed = False

    def prepare(self, model: AdaptedModel) -> None:
        """Needs a frozen A that all clients share, and B to train."""
        if not isinstance(model.adapter, FrozenALora) or model.own:
            raise InputError(
                f"strategy=fedsvd refactors B A with a frozen A common to all clients, and "
                f"adapter={model.adapter.label} has none. Use adapter=ffa or adapter=orthogonal."
            )

    def begin_run(self, server: Server) -> None:
        """A as it is at the start, or after the last refactoring before a resume."""
        self._frozen = dict(server.frozen)

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """The mean of B (and the head), and in every ``refresh``-th round new factors of the same product."""
        mean = weighted_mean(replies)
        self._changed = server_round % self.refresh == 0
        if self._changed:
            for module in modules_of(self._frozen):
                b, a = f"{module}.lora_B.weight", f"{module}.lora_A.weight"
                mean[b], self._frozen[a] = refactored(mean[b], self._frozen[a])
        return mean

    def frozen(self) -> State:
        """Every A, if the last round changed them."""
        return dict(self._frozen) if self._changed else {}


def refactored(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The product ``b @ a`` as ``U S`` ``[m, r]`` and ``V^T`` ``[r, n]`` with orthonormal rows; a zero one as it is.

    By QR of both factors and an SVD of ``[r, r]``, in fp64.
    """
    if b.is_meta or not bool(b.any()):
        return b, a
    left, left_triangle = torch.linalg.qr(b.double())
    right, right_triangle = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(left_triangle @ right_triangle.T)
    return (left @ u * s).to(b), (vh @ right.T).to(a)
