"""LoRA whose rows are kept orthogonal to those of other owners by a penalty, instead of by being frozen.

Every owner (a client or a group, as in :mod:`fedlora.adapters.orthogonal`) starts with A at its own slice of one seeded
orthonormal matrix and trains A and B, with lambda sum_{j != own} ||A Q_j^T||_F^2 added to the loss: Frobenius norms as
in O3 (Gao et al., ICLR 2025, arXiv 2407.10223), where O-LoRA (Wang et al. 2023, arXiv 2310.14152) has absolute values.
There earlier tasks are finished and frozen. Here all owners train at the same time, so what A is kept away from are the
slices Q_j that the others started from, which everybody can draw from the seed: no bytes, and nobody's data.

It is approximate twice. Rows stay orthogonal only as far as lambda holds them, and two owners that both leave for
directions that are in no slice are not seen. And dW is bilinear in what the clients of a group average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from fedlora.adapters.base import Place, State, register
from fedlora.adapters.orthogonal import OrthogonalConfig, OrthogonalLora


class OLoraConfig(OrthogonalConfig):
    """Settings of penalised LoRA.

    Attributes:
        penalty: lambda; 0 trains A freely.
    """

    subspace: Literal["disjoint"] = "disjoint"  # pyright: ignore[reportIncompatibleVariableOverride]
    avoid: Annotated[int, Field(ge=1)] = 1
    penalty: Annotated[float, Field(ge=0)]


@register("o_lora")
class OLora(OrthogonalLora):
    """A and B are trained and travel; A starts at the owner's rows (:meth:`own_tensors`)."""

    Config = OLoraConfig
    affine = False
    trained = ("lora_A", "lora_B")

    @property
    def label(self) -> str:
        """``o_lora``, ``o_lora[groups=4]``."""
        return self.config.name + self.groups_label

    def place(self, key: str, tensor: Tensor) -> Place:
        """Both factors travel."""
        return "shared"

    def penalty_gradient(
        self, layers: Mapping[str, Any], seed: int, state: Mapping[str, Tensor], clients: Sequence[str]
    ) -> State:
        """2 lambda A sum_{j != own} Q_j^T Q_j of every A ``[clients, r, n]``."""
        weight, rank = cast(OLoraConfig, self.config).penalty, self.sizes.rank
        others = torch.ones(len(clients), 1, len(self.slices))
        for place, client in enumerate(clients):
            others[place, 0, self.slices[self.owners[client]]] = 0.0
        others = others.repeat_interleave(rank, 2) * (2 * weight)
        gradients = {}
        for name in layers:
            a = state.get(f"{name}.lora_A.weight")
            if a is not None:
                rows = self.rows.all(len(self.slices), a.shape[-1], seed, name).to(a.device)
                gradients[f"{name}.lora_A.weight"] = (a @ rows.T * others.to(a.device)) @ rows
        return gradients
