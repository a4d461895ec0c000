"""Adapters whose dW is a product of factors, ``dW = s f0 @ f1 ...``: all of them are PEFT LoRA layers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.base import ADAPTER_NAME, Adapter, AdapterConfig, Affinity, State
from fedlora.config import Fraction
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.seeding import torch_generator


class LowRankConfig(AdapterConfig):
    """Settings that every low-rank adapter has.

    Attributes:
        rank: inner dimension r of every factor pair.
        alpha: the update is scaled by ``alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``).
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
        dropout: share of a layer's inputs that the adapter's path drops while training.
    """

    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)]
    rslora: bool
    dropout: Fraction


class LowRankAdapter(Adapter):
    """One low-rank family. Subclasses say which factors train and how the factors start.

    Attributes:
        affine: dW is affine in the trained factors, so that plain averaging is exact.
        factors: names of all low-rank factors of a layer, in the order of the product dW = s * f0 @ f1 ...
        trained: the factors that are trained; the others are frozen and identical on every client.
    """

    Config: ClassVar[type[AdapterConfig]] = LowRankConfig
    affine: ClassVar[bool]
    factors: ClassVar[tuple[str, ...]] = ("lora_B", "lora_A")
    trained: ClassVar[tuple[str, ...]]

    @property
    def sizes(self) -> LowRankConfig:
        """The settings with the type that low-rank adapters share."""
        return cast(LowRankConfig, self.config)

    @property
    def scale(self) -> float:
        """s in dW = s * B @ A."""
        rank = self.sizes.rank
        return self.sizes.alpha / (math.sqrt(rank) if self.sizes.rslora else rank)

    def alpha_at(self, rank: int) -> float:
        """The alpha with which plain LoRA of ``rank`` has this adapter's scale."""
        growth = rank / self.sizes.rank
        return self.sizes.alpha * (math.sqrt(growth) if self.sizes.rslora else growth)

    def peft_config(self) -> LoraConfig:
        """PEFT's LoRA; its random start is replaced by :meth:`initialise`."""
        return self.lora_config(LoraConfig)

    def lora_config(
        self, kind: type[LoraConfig], layer: type[nn.Module] | None = None, rank: int | None = None, **own: Any
    ) -> LoraConfig:
        """A configuration of ``kind`` with the sizes of this adapter.

        Args:
            kind: PEFT's LoRA configuration or one of ours.
            layer: what is put in the place of PEFT's own layer.
            rank: of the layers, where it is not ``adapter.rank``; alpha grows with it, so that the scale stays.
            own: further values of ``kind``.
        """
        config = kind(
            r=self.sizes.rank if rank is None else rank,
            lora_alpha=self.sizes.alpha if rank is None else self.alpha_at(rank),  # pyright: ignore[reportArgumentType]
            use_rslora=self.sizes.rslora,
            lora_dropout=self.sizes.dropout,
            init_lora_weights=False,
            **own,
        )
        if layer is not None:
            config._register_custom_module({nn.Linear: layer, Conv1D: layer})
        return config

    def trains(self, key: str, tensor: Tensor) -> bool:
        """Whether the factor is one of :attr:`trained`."""
        return key.split(".")[-2] in self.trained

    def check(self, layers: Mapping[str, BaseTunerLayer], tensors: Mapping[str, Tensor]) -> None:
        """Refuse layers that are not linear, or smaller than the rank."""
        rank = self.sizes.rank
        for name, layer in layers.items():
            if any(f"{name}.{factor}.weight" not in tensors for factor in self.factors):
                kind = type(layer.get_base_layer()).__name__
                raise InputError(
                    f"adapter.target_modules names '{name}', a layer of type {kind}; choose linear layers."
                )
            n, m = int(layer.in_features), int(layer.out_features)  # pyright: ignore
            if rank > min(m, n):
                raise InputError(
                    f"adapter.rank = {rank} is larger than layer '{name}' ({m} x {n}). Use adapter.rank <= {min(m, n)}."
                )

    def affinity(self, layers: Mapping[str, BaseTunerLayer]) -> Affinity:
        """Known from the formula."""
        return Affinity(self.affine)

    @abstractmethod
    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """Fill every factor in place; see :meth:`Adapter.initialise`."""

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """Return dW = s * B @ A of every adapted module from a full state (shared and frozen factors)."""
        scale = self.scale
        return {
            module: LowRank(state[f"{module}.lora_B.weight"] * scale, state[f"{module}.lora_A.weight"])
            for module in modules_of(state)
        }


def modules_of(state: Mapping[str, Tensor]) -> list[str]:
    """The adapted modules that a state of factors speaks of, in its order."""
    return list(dict.fromkeys(key.split(".lora_")[0] for key in state if ".lora_" in key))


def factor_weight(layer: LoraLayer, factor: str, adapter_name: str = ADAPTER_NAME) -> nn.Parameter:
    """The weight of one factor (``lora_A``, ``lora_B``, ...) of an injected layer."""
    return cast(nn.Parameter, getattr(layer, factor)[adapter_name].weight)


def seeded_uniform(rows: int, columns: int, seed: int, *keys: str | int) -> Tensor:
    """LoRA's own start for A ``[rows, columns]``: uniform in +-1/sqrt(columns) (Kaiming with a = sqrt 5)."""
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=torch_generator(seed, "adapter", *keys))
