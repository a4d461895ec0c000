"""Adapters: the trainable part of the model. One file a method."""

from fedlora.adapters import fed_sb, ffa, lora
from fedlora.adapters.base import Adapter, AdapterConfig, State, build_adapter, register, registered

__all__ = [
    "Adapter",
    "AdapterConfig",
    "State",
    "build_adapter",
    "fed_sb",
    "ffa",
    "lora",
    "register",
    "registered",
]
