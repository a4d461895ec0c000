"""A backbone with an adapter in it: which tensors are shared, private and frozen, and how they are read and set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.base import ADAPTER_NAME, Adapter, State, lora_layers
from fedlora.errors import FedloraError, InputError
from fedlora.lowrank import LowRank


class AdaptedModel:
    """A transformers model with injected adapter layers and an owned list of trainables.

    Keys of a state are ``<module>.<factor>.weight`` for factors and plain parameter names for the head.

    Attributes:
        module: the model; call it like any transformers model.
        shared: keys that travel, in wire order.
        private: trained keys that never leave the client.
        frozen: factor keys that are not trained and identical on every client.
        head: keys of the task head, wherever it belongs.
    """

    def __init__(self, module: nn.Module, adapter: Adapter, head_modules: Iterable[str]) -> None:
        """Inject ``adapter`` into ``module`` in place.

        Raises:
            InputError: the target modules match nothing, or the rank exceeds a layer.
        """
        self.adapter = adapter
        heads = tuple(head_modules)
        self.module = _inject(module, adapter)
        self.layers = dict(lora_layers(self.module))
        _check_ranks(self.layers, adapter)
        self._parameters = {
            f"{name}.{factor}.weight": getattr(layer, factor)[ADAPTER_NAME].weight
            for name, layer in self.layers.items()
            for factor in adapter.factors
        }
        trained = tuple(key for key in self._parameters if key.split(".")[-2] in adapter.trained)
        self.frozen = tuple(key for key in self._parameters if key not in trained)
        head = {
            key: p for key, p in self.module.named_parameters() if key.split(".")[0] in heads and "lora_" not in key
        }
        self._parameters.update(head)
        self.head = tuple(head)
        place = adapter.config.head
        self.shared = trained + (tuple(head) if place == "shared" else ())
        self.private = tuple(head) if place == "private" else ()
        self._corrections: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.get_base_layer().register_forward_hook(self._correction_hook(name))
        self.own_trainables()

    @property
    def trainable(self) -> tuple[str, ...]:
        """Every trained key: shared, then private."""
        return self.shared + self.private

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters in key order."""
        return [self._parameters[key] for key in self.trainable]

    def own_trainables(self) -> None:
        """Train exactly the trained keys, whatever PEFT has switched on or off."""
        self.module.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def assert_trainables(self) -> None:
        """Check that exactly the trained keys require gradients.

        Raises:
            FedloraError: something else would be trained, or something trained has been frozen.
        """
        owned = {id(parameter) for parameter in self.parameters()}
        wrong = [name for name, p in self.module.named_parameters() if p.requires_grad != (id(p) in owned)]
        if wrong:
            raise FedloraError(f"Trainable tensors changed behind adapter '{self.adapter.label}': {', '.join(wrong)}.")

    def read(self, keys: Iterable[str]) -> State:
        """Copy the tensors of ``keys`` out of the model."""
        return {key: self._parameters[key].detach().clone() for key in keys}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` into the model in place.

        Raises:
            FedloraError: a key is unknown or a shape differs.
        """
        with torch.no_grad():
            for key, value in state.items():
                parameter = self._parameters.get(key)
                if parameter is None or parameter.shape != value.shape:
                    expected = "no such tensor" if parameter is None else f"expected {list(parameter.shape)}"
                    raise FedloraError(f"Cannot load tensor '{key}' of shape {list(value.shape)}: {expected}.")
                parameter.copy_(value)

    def initialise(self, seed: int, gradients: State | None = None) -> None:
        """Start the adapter's factors; see :meth:`Adapter.initialise`."""
        self.adapter.initialise(self.layers, seed, gradients)

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """dW of every adapted module for a (shared) state, with the model's own frozen factors."""
        return self.adapter.delta({**self.read(self.frozen), **state})

    def shapes(self, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of ``keys``; works on the meta device."""
        return {key: tuple(self._parameters[key].shape) for key in keys}

    def set_base_correction(self, corrections: Mapping[str, Tensor]) -> None:
        """Add a full-rank fp32 correction ``{module: [m, n]}`` beside the frozen weights (empty: none).

        The frozen weights themselves are never changed, so low-precision backbones lose nothing.
        """
        self._corrections = dict(corrections)

    def _correction_hook(self, name: str):
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            correction = self._corrections.get(name)
            if correction is None:
                return None
            return output + functional.linear(inputs[0].to(correction.dtype), correction).to(output.dtype)

        return add


def _inject(module: nn.Module, adapter: Adapter) -> nn.Module:
    config = adapter.peft_config()
    config.fan_in_fan_out = any(isinstance(child, Conv1D) for child in module.modules())
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws values that initialise() replaces
            return inject_adapter_in_model(
                config, module, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=_is_meta(module)
            )
    except ValueError as error:
        linear = {
            name.split(".")[-1] for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)
        }
        raise InputError(
            f"adapter.target_modules = {adapter.config.target_modules!r} matches no layer of this backbone. "
            f"Its linear layers are named: {', '.join(sorted(linear))}."
        ) from error


def _check_ranks(layers: Mapping[str, LoraLayer], adapter: Adapter) -> None:
    rank = adapter.config.rank
    for name, layer in layers.items():
        if any(ADAPTER_NAME not in getattr(layer, factor, ()) for factor in adapter.factors):
            kind = type(layer.get_base_layer()).__name__
            raise InputError(f"adapter.target_modules names '{name}', a layer of type {kind}; choose linear layers.")
        n, m = int(layer.in_features), int(layer.out_features)  # pyright: ignore
        if rank > min(m, n):
            raise InputError(
                f"adapter.rank = {rank} is larger than layer '{name}' ({m} x {n}). Use adapter.rank <= {min(m, n)}."
            )


def _is_meta(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta
