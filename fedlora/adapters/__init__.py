"""Adapters: the trainable part of the model. One file a method."""

from fedlora.adapters import lean  # noqa: F401  before whatever imports PEFT

# isort: split
from fedlora.adapters import (
    any_peft,
    fed_sb,
    fedsa,
    ffa,
    full,
    la_lora,
    lora,
    lora_ga,
    o_lora,
    orthogonal,
    personal_lora,
    pfedlora,
    prototypes,
    ravan,
)
from fedlora.adapters.base import Adapter, AdapterConfig, Affinity, State, build_adapter, register, registered
from fedlora.adapters.factored import LowRankAdapter, LowRankConfig

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Affinity",
    "LowRankAdapter",
    "LowRankConfig",
    "State",
    "any_peft",
    "build_adapter",
    "fed_sb",
    "fedsa",
    "ffa",
    "full",
    "la_lora",
    "lora",
    "lora_ga",
    "o_lora",
    "orthogonal",
    "personal_lora",
    "pfedlora",
    "prototypes",
    "ravan",
    "register",
    "registered",
]
