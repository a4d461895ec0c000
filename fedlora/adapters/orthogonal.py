"""LoRA on orthonormal rows: dW = s B A with A A^T = I frozen, and a plan of the subspaces in which clients train.

A is never sent: a client draws it from the seed, layer by layer. ``shared``: all clients train in the same rows, so a
mean of B is exact. ``complementary``: so they do, in rows orthogonal to the leading right singular directions of the
backbone's weight, those that it uses most. ``disjoint``: every client has rows of its own, orthogonal to all others'
(as RAVAN's heads are, Raje et al., NeurIPS 2025, and the tasks of DOLFIN, arXiv 2510.13567, for clients instead); then
<dW_i, dW_j> = 0, and a sum of updates keeps each client's apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor

from fedlora.adapters.base import Affinity, Place, State, register
from fedlora.adapters.bases import complementary_rows, orthonormal_rows
from fedlora.adapters.factored import LowRankConfig, factor_weight
from fedlora.adapters.fed_sb import oriented_weight
from fedlora.adapters.ffa import FrozenALora
from fedlora.errors import InputError


class OrthogonalConfig(LowRankConfig):
    """Settings of orthogonal LoRA.

    Attributes:
        subspace: ``shared`` (the same rows for all), ``complementary`` (the same, away from what the backbone's weight
            uses most) or ``disjoint`` (every training client its own; for strategies that sum).
        avoid: with ``complementary``, how many leading right singular directions of a weight A is orthogonal to.
    """

    subspace: Literal["shared", "complementary", "disjoint"]
    avoid: Annotated[int, Field(ge=1)]


@register("orthogonal")
class OrthogonalLora(FrozenALora):
    """Only B is trained. In ``disjoint`` A has place ``client``, and is zero where no client is: see the strategy."""

    Config = OrthogonalConfig

    def __init__(self, config: OrthogonalConfig) -> None:
        super().__init__(config)
        self._rows: dict[tuple[int, str], Tensor] = {}

    @property
    def settings(self) -> OrthogonalConfig:
        """The settings with their own type."""
        return cast(OrthogonalConfig, self.config)

    @property
    def label(self) -> str:
        """``orthogonal[shared]`` and so on."""
        return f"{self.config.name}[{self.settings.subspace}]"

    @property
    def disjoint(self) -> bool:
        """Whether every client has its own rows."""
        return self.settings.subspace == "disjoint"

    def place(self, key: str, tensor: Tensor) -> Place:
        """A is frozen, or a client's own."""
        return "client" if self.disjoint and ".lora_A." in key else super().place(key, tensor)

    def affinity(self, layers: Mapping[str, BaseTunerLayer]) -> Affinity:
        """Affine where A is common to all clients: a mean of B means nothing across different subspaces."""
        return Affinity(not self.disjoint)

    def check(self, layers: Mapping[str, BaseTunerLayer], tensors: Mapping[str, Tensor]) -> None:
        """Refuse layers with too few input features for the rows that the plan needs."""
        super().check(layers, tensors)
        rank, avoid, count = self.sizes.rank, self.settings.avoid, len(self.clients)
        for name, layer in layers.items():
            n, m = int(layer.in_features), int(layer.out_features)  # pyright: ignore
            if self.disjoint and count * rank > n:
                fewer = f"adapter.rank <= {n // count}, or " if count <= n else ""
                raise InputError(
                    f"adapter.subspace=disjoint gives each of {count} training clients adapter.rank = {rank} rows of "
                    f"its own, and layer '{name}' has n = {n} input features: enough for {n // rank} clients. "
                    f"Use {fewer}at most {n // rank} clients (partition.min_rows, or a partition with "
                    "partition.clients), or adapter.subspace=shared."
                )
            if self.settings.subspace == "complementary" and avoid > min(m, n - rank):
                raise InputError(
                    f"adapter.avoid = {avoid} leaves no {rank} rows in layer '{name}' ({m} x {n}). "
                    f"Use adapter.avoid <= {min(m, n - rank)}."
                )

    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """A by the plan and B zero; A is zero on the meta device where it needs weights, and where clients have own."""
        rank = self.sizes.rank
        with torch.no_grad():
            for name, layer in layers.items():
                a = factor_weight(layer, "lora_A")
                factor_weight(layer, "lora_B").zero_()
                if self.disjoint or a.is_meta:
                    a.zero_()
                elif self.settings.subspace == "shared":
                    a.copy_(orthonormal_rows(a.shape[1], rank, 1, seed, name))
                else:
                    a.copy_(complementary_rows(oriented_weight(layer), rank, self.settings.avoid, seed, name))

    def own_tensors(self, layers: Mapping[str, Any], seed: int, position: int) -> State:
        """Rows ``position r`` to ``(position + 1) r`` of each layer's orthonormal matrix ``[clients r, n]``."""
        if not self.disjoint:
            return {}
        return {f"{name}.lora_A.weight": self._own_rows(name, layer, seed, position) for name, layer in layers.items()}

    def _own_rows(self, name: str, layer: LoraLayer, seed: int, position: int) -> Tensor:
        rank, n = self.sizes.rank, int(layer.in_features)  # pyright: ignore
        if factor_weight(layer, "lora_A").is_meta:
            return torch.zeros(rank, n, device="meta")
        if (seed, name) not in self._rows:
            self._rows[seed, name] = orthonormal_rows(n, rank, len(self.clients), seed, name)
        return self._rows[seed, name][position * rank : (position + 1) * rank]
