"""Fed-SB (Singhal et al. 2025, arXiv 2502.15436): dW = s B R A with only the small square R trained and shared.

The frozen basis (B, A) comes from one of four sources, recorded in every table as ``fed_sb[<basis>]``; see
:mod:`fedlora.adapters.bases`. dW is linear in R, so averaging R is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import bases
from fedlora.adapters.base import State, register
from fedlora.adapters.core import CoreLinear
from fedlora.adapters.factored import LowRankAdapter, LowRankConfig, factor_weight, modules_of
from fedlora.adapters.quantised import decoded_weight
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.seeding import derive_seed


class FedSBLinear(CoreLinear):
    """A PEFT LoRA layer with a square factor R between A and B: y = W x + s B R A x.

    R is an ``nn.Linear`` so that per-sample gradients and functional calls treat it like any other layer.
    """

    adapter_layer_names = (*CoreLinear.adapter_layer_names, "lora_R")
    core = "lora_R"

    def new_core(self, r: int, config: LoraConfig) -> nn.Module:
        """R ``[r, r]``."""
        return nn.Linear(r, r, bias=False)


class FedSBConfig(LowRankConfig):
    """Fed-SB's settings.

    Attributes:
        basis: ``gradient`` (LoRA-SB, from the server's public sample; sent once), ``client_gradient`` (the same
            from the sum of gradients that the clients of the first cohort send once), ``weight`` (LoRA-XS, SVD of the
            backbone) or ``seeded`` (orthonormal); the last two cost no bytes.
        basis_step: size of the first update dW1 = -basis_step * sign(gradient) that the gradient basis factors.
    """

    basis: Literal["gradient", "client_gradient", "weight", "seeded"]
    basis_step: Annotated[float, Field(gt=0)]


@register("fed_sb")
class FedSB(LowRankAdapter):
    """Only R is trained. With a gradient basis the run starts at the best rank-r part of the first update."""

    Config = FedSBConfig
    affine = True
    factors = ("lora_B", "lora_R", "lora_A")
    trained = ("lora_R",)

    @property
    def settings(self) -> FedSBConfig:
        """The settings with their own type."""
        return cast(FedSBConfig, self.config)

    @property
    def label(self) -> str:
        """``fed_sb[gradient]`` and so on."""
        return f"{self.config.name}[{self.settings.basis}]"

    @property
    def broadcast_frozen(self) -> bool:
        """A gradient basis cannot be derived from the seed, so every client receives it once."""
        return self.settings.basis in ("gradient", "client_gradient")

    @property
    def needs_public_sample(self) -> bool:
        """Only the gradient basis does."""
        return self.settings.basis == "gradient"

    @property
    def needs_client_gradients(self) -> bool:
        """Only the basis of that name does."""
        return self.settings.basis == "client_gradient"

    def peft_config(self) -> LoraConfig:
        """PEFT's LoRA with our layer in place of its own."""
        return self.lora_config(LoraConfig, FedSBLinear)

    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """Set the basis and R of every layer.

        A client whose basis will be broadcast has no gradients: its basis stays zero until the server's arrives.
        """
        for name, layer in layers.items():
            b, r, a = (factor_weight(layer, factor) for factor in self.factors)
            waits = self.broadcast_frozen and gradients is None
            basis = None if a.is_meta or waits else self._basis(name, layer, seed, gradients, {})
            with torch.no_grad():
                b.copy_(basis.left) if basis else b.zero_()
                r.copy_(torch.diag(basis.core) / self.scale) if basis else r.zero_()
                a.copy_(basis.right) if basis else a.zero_()

    def drawn(self, layers: Mapping[str, LoraLayer], seed: int, server_round: int) -> State:
        """The seeded basis that is new after ``server_round``, the same for the server and every client."""
        if self.settings.basis != "seeded":
            return super().drawn(layers, seed, server_round)
        return self.refreshed(layers, None, {}, derive_seed(seed, "refresh", server_round))

    def refreshed(
        self,
        layers: Mapping[str, LoraLayer],
        gradients: State | None,
        correction: Mapping[str, Tensor],
        seed: int = 0,
    ) -> State:
        """A new basis of every layer, for R = 0: the frozen tensors that take the place of the present ones.

        Args:
            layers: injected layers by module name; on the meta device the tensors have shapes only.
            gradients: ``{module: [m, n]}`` summed loss gradients at the present model, for the gradient basis.
            correction: what has been added to the backbone ``{module: [m, n]}``, for the basis of the weight.
            seed: of the seeded basis; another than the last, so that the subspace is another.
        """
        frozen: State = {}
        for name, layer in layers.items():
            b, _, a = (factor_weight(layer, factor) for factor in self.factors)
            basis = None if a.is_meta else self._basis(name, layer, seed, gradients, correction)
            frozen[f"{name}.lora_A.weight"] = basis.right.float().cpu() if basis else torch.empty_like(a)
            frozen[f"{name}.lora_B.weight"] = basis.left.float().cpu() if basis else torch.empty_like(b)
        return frozen

    def _basis(
        self, name: str, layer: LoraLayer, seed: int, gradients: State | None, correction: Mapping[str, Tensor]
    ) -> bases.Basis:
        rank = self.settings.rank
        if self.settings.basis == "seeded":
            b, _, a = (factor_weight(layer, factor) for factor in self.factors)
            return bases.seeded_basis(b.shape[0], a.shape[1], rank, seed, name)
        if self.settings.basis == "weight":
            weight = oriented_weight(layer)
            return bases.weight_basis(
                weight + correction[name].to(weight.device) if name in correction else weight, rank
            )
        assert gradients is not None
        return bases.gradient_basis(gradients[name], rank, self.settings.basis_step)

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """dW = s B R A, as left = s B R ``[m, r]`` and right = A ``[r, n]``."""
        deltas = {}
        for module in modules_of(state):
            b, r, a = (state[f"{module}.{factor}.weight"] for factor in self.factors)
            deltas[module] = LowRank((b @ r) * self.scale, a)
        return deltas


def oriented_weight(layer: LoraLayer) -> Tensor:
    """The base weight as ``[m, n]`` (out, in), whatever the layer stores, decoded where it is quantised.

    Raises:
        InputError: the layer has no plain matrix weight.
    """
    base = layer.get_base_layer()
    weight = decoded_weight(base)
    if weight.ndim != 2:
        raise InputError(f"{type(base).__name__} holds no matrix to look at; choose linear adapter.target_modules.")
    return weight.T if isinstance(base, Conv1D) else weight
