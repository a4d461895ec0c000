"""LoRA on orthonormal rows: dW = s B A with A A^T = I frozen, and a plan of the subspaces in which clients train.

A is never sent: a client draws it from the seed, layer by layer. ``shared``: all clients train in the same rows, so a
mean of B is exact. ``complementary``: so they do, in rows orthogonal to the leading right singular directions of the
backbone's weight, those that it uses most. ``disjoint``: every client, or every group of clients, has rows of its own,
orthogonal to all others' (as RAVAN's heads are, Raje et al., NeurIPS 2025, and the tasks of DOLFIN, arXiv 2510.13567);
then <dW_i, dW_j> = 0 for different owners i and j, and a sum of updates keeps each owner's apart. A layer with n inputs
has room for n / r owners, so groups are how many clients fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor

from fedlora.adapters.base import Affinity, Place, State, register
from fedlora.adapters.bases import OwnRows, complementary_rows, orthonormal_rows
from fedlora.adapters.factored import LowRankConfig, factor_weight
from fedlora.adapters.fed_sb import oriented_weight
from fedlora.adapters.ffa import FrozenALora
from fedlora.errors import InputError


class OrthogonalConfig(LowRankConfig):
    """Settings of orthogonal LoRA.

    Attributes:
        subspace: ``shared`` (the same rows for all), ``complementary`` (the same, away from what the backbone's weight
            uses most) or ``disjoint`` (every owner its own; for strategies that sum).
        groups: with ``disjoint``, who owns rows: every training client (``None``), that many groups, to which the
            clients belong in turn by their sorted ids, or the groups of the data's column ``data.group`` (``natural``).
        avoid: with ``complementary``, how many leading right singular directions of a weight A is orthogonal to.
    """

    subspace: Literal["shared", "complementary", "disjoint"]
    groups: Annotated[int, Field(ge=1)] | Literal["natural"] | None
    avoid: Annotated[int, Field(ge=1)]


@register("orthogonal")
class OrthogonalLora(FrozenALora):
    """Only B is trained. In ``disjoint`` A has place ``client``, and is zero where no client is: see the strategy."""

    Config = OrthogonalConfig
    needs_clients = True

    def __init__(self, config: OrthogonalConfig) -> None:
        super().__init__(config)
        self.rows = OwnRows(self.sizes.rank)
        if self.settings.groups is not None and not self.disjoint:
            raise InputError(
                f"adapter.groups = {self.settings.groups} needs rows of their own for groups of clients, and with "
                f"adapter.subspace={self.settings.subspace} all have the same. Use adapter.subspace=disjoint (and "
                "strategy=disjoint), or adapter.groups=null."
            )

    @property
    def settings(self) -> OrthogonalConfig:
        """The settings with their own type."""
        return cast(OrthogonalConfig, self.config)

    @property
    def label(self) -> str:
        """``orthogonal[shared]`` and so on, ``orthogonal[disjoint][groups=4]``."""
        return f"{self.config.name}[{self.settings.subspace}]{self.groups_label}"

    @property
    def groups_label(self) -> str:
        """``[groups=4]``; nothing where every client is its own owner."""
        return "" if self.settings.groups is None else f"[groups={self.settings.groups}]"

    @property
    def disjoint(self) -> bool:
        """Whether every client or group has its own rows."""
        return self.settings.subspace == "disjoint"

    @cached_property
    def owners(self) -> dict[str, str]:
        """Who owns the rows in which each training client trains: itself, or its group."""
        groups = self.settings.groups
        if groups is None:
            return {client: client for client in self.clients}
        if groups == "natural":
            return dict(self.groups)
        return {client: f"group-{place % groups:04d}" for place, client in enumerate(self.clients)}

    @cached_property
    def slices(self) -> dict[str, int]:
        """The number of every owner's slice of rows."""
        return {owner: number for number, owner in enumerate(dict.fromkeys(self.owners.values()))}

    def place(self, key: str, tensor: Tensor) -> Place:
        """A is frozen, or its owner's."""
        return "client" if self.disjoint and ".lora_A." in key else super().place(key, tensor)

    def affinity(self, layers: Mapping[str, BaseTunerLayer]) -> Affinity:
        """Affine where A is common to all clients: a mean of B means nothing across different subspaces."""
        return Affinity(not self.disjoint)

    def check(self, layers: Mapping[str, BaseTunerLayer], tensors: Mapping[str, Tensor]) -> None:
        """Refuse layers with too few input features for the rows that the plan needs."""
        super().check(layers, tensors)
        if self.disjoint:
            self._check_groups()
        rank, avoid, count = self.sizes.rank, self.settings.avoid, len(self.slices)
        for name, layer in layers.items():
            n, m = int(layer.in_features), int(layer.out_features)  # pyright: ignore
            if self.disjoint and count * rank > n:
                fewer = f"adapter.rank <= {n // count}, or " if count <= n else ""
                who, kind = ("training clients", "clients") if self.settings.groups is None else ("groups", "groups")
                raise InputError(
                    f"adapter={self.label} gives each of {count} {who} adapter.rank = {rank} rows of its own, and "
                    f"layer '{name}' has n = {n} input features: enough for {n // rank} {kind}. Use {fewer}"
                    f"adapter.groups <= {n // rank} (clients of a group share its rows), or adapter=orthogonal "
                    "adapter.subspace=shared."
                )
            if self.settings.subspace == "complementary" and avoid > min(m, n - rank):
                raise InputError(
                    f"adapter.avoid = {avoid} leaves no {rank} rows in layer '{name}' ({m} x {n}). "
                    f"Use adapter.avoid <= {min(m, n - rank)}."
                )

    def _check_groups(self) -> None:
        """Refuse groups that are not there."""
        groups, count = self.settings.groups, len(self.clients)
        if groups == "natural" and not self.groups:
            raise InputError(
                "adapter.groups=natural takes the groups from the data, and the data names none. Set data.group to the "
                "column with the group of a row's client, or adapter.groups to a number of groups."
            )
        if isinstance(groups, int) and groups > count:
            raise InputError(
                f"adapter.groups = {groups}, but there are only {count} training clients. Use adapter.groups <= "
                f"{count}, or adapter.groups=null for rows of its own for every client."
            )

    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """A by the plan and B zero; A is zero on the meta device where it needs weights, and where owners have own."""
        rank = self.sizes.rank
        with torch.no_grad():
            for name, layer in layers.items():
                a = factor_weight(layer, "lora_A")
                factor_weight(layer, "lora_B").zero_()
                if self.disjoint or a.is_meta:
                    a.zero_()
                elif self.settings.subspace == "shared":
                    a.copy_(orthonormal_rows(a.shape[1], [rank], seed, name))
                else:
                    a.copy_(complementary_rows(oriented_weight(layer), rank, self.settings.avoid, seed, name))

    def own_tensors(self, layers: Mapping[str, Any], seed: int, client: str) -> State:
        """Rows ``i r`` to ``(i + 1) r`` of each layer's orthonormal ``[owners r, n]``, for owner i."""
        if not self.disjoint:
            return {}
        place = self.slices[self.owners[client]]
        return {
            f"{name}.lora_A.weight": torch.zeros(self.sizes.rank, _inputs(layer), device="meta")
            if factor_weight(layer, "lora_A").is_meta
            else self.rows.of(place, len(self.slices), _inputs(layer), seed, name)
            for name, layer in layers.items()
        }


def _inputs(layer: LoraLayer) -> int:
    return int(layer.in_features)  # pyright: ignore
