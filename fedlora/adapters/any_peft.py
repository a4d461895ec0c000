"""Any adapter of PEFT by its configuration class: ``adapter=peft adapter.config._target_=peft.MissConfig``.

Nothing about a method is written down here. Which tensors it has is found by injecting it, what it trains is what
PEFT lets require gradients, whether it is affine is measured (:mod:`fedlora.adapters.affinity`), and so is dW
(:mod:`fedlora.adapters.probe`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, Literal, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.affinity import affinity_of
from fedlora.adapters.base import Adapter, AdapterConfig, Affinity, register
from fedlora.adapters.injection import logged_warnings
from fedlora.config import nearest
from fedlora.errors import InputError
from fedlora.plugins import load_object

# What is ours to decide, or changes more than the adapted layers.
_REFUSED = {
    "adapter_name": "an adapter has one name here",
    "peft_type": "_target_ says it",
    "peft_version": "the installed one is used",
    "task_type": "the task says it",
    "inference_mode": "clients train",
    "base_model_name_or_path": "the backbone says it",
    "revision": "the backbone says it",
    "auto_mapping": "the backbone says it",
    "modules_to_save": "adapter.head says what happens to the head",
    "trainable_token_indices": "embeddings are not adapted",
    "target_parameters": "layers are adapted, not single parameters",
    "layer_replication": "the backbone stays as it is",
}
_NO_LAYERS = {
    "POLY": "its layers ask for the number of a task with every row",
    "SHADOW": "it runs a second model beside the backbone",
    "XLORA": "it mixes adapters that are trained already",
    "ADAPTION_PROMPT": "it adds prompts to attention, not an update to a layer",
    "TRAINABLE_TOKENS": "it trains embeddings, not layers",
}


class AnyPeftConfig(AdapterConfig):
    """Settings of a PEFT adapter.

    Attributes:
        config: ``_target_``, the import path of a ``peft.PeftConfig`` class, and fields of that class.
        frozen: where clients get the frozen tensors from: drawn alike from the run's seed (``seeded``), or sent once
            and counted as setup bytes (``broadcast``).
    """

    config: dict[str, Any]
    frozen: Literal["seeded", "broadcast"]


@register("peft")
class AnyPeft(Adapter):
    """Everything that PEFT can inject into linear (or normalisation) layers."""

    Config = AnyPeftConfig

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.settings = cast(AnyPeftConfig, config)
        self._class, self._fields = _checked(self.settings)
        with logged_warnings():
            _require_layers(self._new())

    @property
    def label(self) -> str:
        """``peft[Miss]``, ``peft[Lora,use_dora]``: the method and the variants that its settings choose."""
        chosen = [(key, value) for key, value in self._fields.items() if _is_variant(key, value)]
        variants = [key if value is True else f"{key}={value}" for key, value in chosen]
        name = self._class.__name__.removesuffix("Config")
        return f"{self.config.name}[{','.join([name, *sorted(variants)])}]"

    @property
    def broadcast_frozen(self) -> bool:
        """As ``adapter.frozen`` says."""
        return self.settings.frozen == "broadcast"

    def peft_config(self) -> PeftConfig:
        """The configured class with the configured fields; what it warns of has been logged at the start."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._new()

    def _new(self) -> PeftConfig:
        try:
            return self._class(**self._fields)
        except (ValueError, TypeError, ImportError, AttributeError) as error:
            raise InputError(f"adapter.config: {self._class.__name__} refuses its fields: {error}") from error

    def trains(self, key: str, tensor: Tensor) -> bool:
        """What PEFT lets require gradients."""
        return tensor.requires_grad

    def check(self, layers: Mapping[str, BaseTunerLayer], tensors: Mapping[str, Tensor]) -> None:
        """Refuse embeddings and convolutions, and a broadcast of nothing; find out whether the backbone is changed."""
        for name, layer in layers.items():
            base = layer.get_base_layer()
            if not isinstance(base, nn.Linear | Conv1D | nn.LayerNorm):
                kind = type(base).__name__
                raise InputError(
                    f"adapter.target_modules names '{name}', a layer of type {kind}; choose linear layers."
                )
        if not layers or not any(self.trains(key, tensor) for key, tensor in tensors.items()):
            raise InputError(f"adapter.config: {self.label} leaves nothing to train in this backbone.")
        if self.broadcast_frozen and all(self.trains(key, tensor) for key, tensor in tensors.items()):
            raise InputError(
                f"adapter.frozen=broadcast: {self.label} has no frozen tensors to send. Use adapter.frozen=seeded."
            )
        self.affinity(layers)

    def affinity(self, layers: Mapping[str, BaseTunerLayer]) -> Affinity:
        """Measured on a small layer like the first adapted one."""
        return affinity_of(self.peft_config(), next(iter(layers.values())).get_base_layer())


def _checked(settings: AnyPeftConfig) -> tuple[type[PeftConfig], dict[str, Any]]:
    """The configuration class and its fields.

    Raises:
        InputError: no such class, one that adapts no layers, or a field that it does not have.
    """
    fields = dict(settings.config)
    target = fields.pop("_target_", None)
    if not target:
        raise InputError(
            "adapter=peft needs a configuration class: adapter.config._target_=peft.MissConfig (or any other of PEFT)."
        )
    config_class = load_object(str(target), "adapter.config._target_")
    if not (isinstance(config_class, type) and issubclass(config_class, PeftConfig)):
        raise InputError(
            f"adapter.config._target_ = '{target}' is no PEFT configuration: name a class such as peft.MissConfig."
        )
    known = {field.name for field in dataclasses.fields(config_class)}
    for key in fields:
        if key in _REFUSED:
            raise InputError(f"Setting 'adapter.config.{key}' cannot be given: {_REFUSED[key]}.")
        if key not in known:
            raise InputError(
                f"Unknown setting 'adapter.config.{key}' for {config_class.__name__}.{nearest(key, known)} "
                f"It has: {', '.join(sorted(known - set(_REFUSED)))}."
            )
    if fields.get("bias", "none") != "none":
        raise InputError(f"adapter.config.bias = {fields['bias']!r} would train the backbone's biases; use 'none'.")
    if "target_modules" in fields and settings.target_modules is not None:
        raise InputError("adapter.target_modules and adapter.config.target_modules are both set: keep one of them.")
    return config_class, fields


def _require_layers(config: PeftConfig) -> None:
    """Refuse methods that adapt no layers; the message says what they do instead."""
    name = type(config).__name__
    if config.is_prompt_learning:
        raise InputError(
            f"adapter.config._target_: {name} learns a prompt and adapts no layers: there is no update to aggregate. "
            "Choose a method that adapts layers, such as peft.LoraConfig or peft.MissConfig."
        )
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind in _NO_LAYERS or config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise InputError(f"adapter.config._target_: {name} cannot be used: {_NO_LAYERS.get(kind, 'it has no layers')}.")


def _is_variant(key: str, value: Any) -> bool:
    return key not in ("target_modules", "exclude_modules") and (value is True or isinstance(value, str))
