"""The adapter seam: what is trained, what is frozen, how it starts, and the update it makes to each weight.

A method is one file with one subclass of :class:`Adapter` and one ``@register`` line. PEFT injects the layers and
names them; the list of trainable tensors is ours, because PEFT turns gradients of frozen factors back on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor, nn

from fedlora.config import Settings, nearest, validate
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.seeding import torch_generator

State = dict[str, Tensor]
ADAPTER_NAME = "default"


class AdapterConfig(Settings):
    """Settings that every low-rank adapter has.

    Attributes:
        rank: inner dimension r of every factor pair.
        alpha: the update is scaled by ``alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``).
        target_modules: layer names to adapt; ``None`` takes PEFT's defaults for the architecture.
        head: whether the task head travels (``shared``), stays at the client (``private``) or is not trained.
    """

    name: str
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)]
    rslora: bool
    target_modules: list[str] | str | None
    head: Literal["shared", "private", "frozen"]


class Adapter(ABC):
    """One adapter family. Subclasses say which factors train and how the factors start.

    Attributes:
        affine: dW is affine in the shared tensors, so that plain averaging is exact.
        factors: names of all low-rank factors of a layer, in the order of the product dW = s * f0 @ f1 ...
        trained: the factors that are trained; the others are frozen and identical on every client.
    """

    Config: ClassVar[type[AdapterConfig]] = AdapterConfig
    affine: ClassVar[bool]
    factors: ClassVar[tuple[str, ...]] = ("lora_B", "lora_A")
    trained: ClassVar[tuple[str, ...]]

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    @property
    def label(self) -> str:
        """The name that tables print; it carries every choice that changes the numbers."""
        return self.config.name

    @property
    def scale(self) -> float:
        """s in dW = s * B @ A."""
        rank = self.config.rank
        return self.config.alpha / (math.sqrt(rank) if self.config.rslora else rank)

    @property
    def broadcast_frozen(self) -> bool:
        """Whether the frozen factors must be sent to every client once (setup bytes) instead of being seeded."""
        return False

    @property
    def needs_public_sample(self) -> bool:
        """Whether :meth:`initialise` on the server needs gradients of a server-held public sample."""
        return False

    def peft_config(self) -> LoraConfig:
        """The PEFT configuration that injects this adapter's layers."""
        return LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # pyright: ignore[reportArgumentType]
            use_rslora=self.config.rslora,
            target_modules=self.config.target_modules,
            lora_dropout=0.0,
            init_lora_weights=False,
        )

    @abstractmethod
    def initialise(self, layers: Mapping[str, LoraLayer], seed: int, gradients: State | None = None) -> None:
        """Fill every factor in place.

        Args:
            layers: injected layers by module name.
            seed: the run's seed; each layer draws from its own stream.
            gradients: ``{module: [m, n]}`` summed loss gradients of the public sample, when asked for.
        """

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """Return dW = s * B @ A of every adapted module from a full state (shared and frozen factors)."""
        return {
            module: LowRank(state[f"{module}.lora_B.weight"] * self.scale, state[f"{module}.lora_A.weight"])
            for module in modules_of(state)
        }


_REGISTRY: dict[str, type[Adapter]] = {}


def register(name: str) -> Any:
    """Class decorator: make an adapter available as ``adapter=<name>``."""

    def add(adapter: type[Adapter]) -> type[Adapter]:
        _REGISTRY[name] = adapter
        return adapter

    return add


def build_adapter(values: Mapping[str, Any]) -> Adapter:
    """Return the adapter named by ``values["name"]`` with its settings checked.

    Raises:
        InputError: the name is unknown, or a setting is unknown to this adapter or out of range.
    """
    name = str(values.get("name"))
    if name not in _REGISTRY:
        raise InputError(f"adapter.name = '{name}' is not known.{nearest(name, _REGISTRY)} Known: {sorted(_REGISTRY)}.")
    adapter = _REGISTRY[name]
    return adapter(validate(adapter.Config, values, "adapter"))


def registered() -> dict[str, type[Adapter]]:
    """All registered adapters by name."""
    return dict(sorted(_REGISTRY.items()))


def modules_of(state: Mapping[str, Tensor]) -> list[str]:
    """The adapted modules that a state speaks of, in its order."""
    return list(dict.fromkeys(key.split(".lora_")[0] for key in state if ".lora_" in key))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every injected layer with its module name, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def factor_weight(layer: LoraLayer, factor: str, adapter_name: str = ADAPTER_NAME) -> nn.Parameter:
    """The weight of one factor (``lora_A``, ``lora_B``, ...) of an injected layer."""
    return cast(nn.Parameter, getattr(layer, factor)[adapter_name].weight)


def seeded_uniform(rows: int, columns: int, seed: int, *keys: str) -> Tensor:
    """LoRA's own start for A ``[rows, columns]``: uniform in +-1/sqrt(columns) (Kaiming with a = sqrt 5)."""
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=torch_generator(seed, "adapter", *keys))
