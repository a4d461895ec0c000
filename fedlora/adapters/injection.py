"""Put PEFT's layers into a model from a seed, and find out which tensors that has added."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.base import ADAPTER_NAME, Adapter
from fedlora.adapters.lean import see_quantised_layers
from fedlora.adapters.targets import linear_layers, resolve_targets
from fedlora.errors import FedloraError, InputError
from fedlora.seeding import derive_seed

log = logging.getLogger("fedlora")


class WeightsNeededError(FedloraError):
    """The layers of this adapter cannot be made without the backbone's weights (on the meta device)."""


@dataclass(frozen=True)
class Injected:
    """What an injection has made.

    Attributes:
        tuner: PEFT's wrapper of the model; tensors that many layers share live in it.
        layers: the adapted layers by module name, in model order.
        tensors: every tensor that was not there before, by PEFT's name without the adapter name
            (``<module>.miss_block``, ``<module>.lora_A.weight``); a tensor that layers share has the first one's name.
    """

    tuner: BaseTuner
    layers: dict[str, BaseTunerLayer]
    tensors: dict[str, Tensor]


def inject(module: nn.Module, adapter: Adapter, head_modules: Iterable[str], seed: int) -> Injected:
    """Inject ``adapter`` into ``module`` in place; every draw comes from ``seed``, none from the global generator.

    Raises:
        InputError: the target modules match nothing, PEFT refuses the configuration, or it changes the backbone itself.
        WeightsNeededError: on the meta device, for adapters whose shapes or masks depend on the weights.
    """
    config = configured(adapter, module, head_modules)
    meta = next(module.parameters()).is_meta
    names = linear_layers(module)
    with logged_warnings():
        tuner, new = _inject(config, module, seed, meta, f"adapter.target_modules = {_shown(adapter, config)}", names)
    layers = {
        name: child
        for name, child in tuner.model.named_modules()
        if isinstance(child, BaseTunerLayer) and _holds(child)
    }
    return Injected(tuner, layers, {plain_name(name): tensor for name, tensor in new.items()})


def configured(adapter: Adapter, module: nn.Module, head_modules: Iterable[str]) -> PeftConfig:
    """The adapter's PEFT configuration with what depends on the model filled in: target modules, transposition."""
    config = adapter.peft_config()
    if adapter.config.target_modules is not None:
        resolved = resolve_targets(adapter.config.target_modules, module, head_modules)
        config.target_modules = set(resolved) if isinstance(resolved, list) else resolved  # pyright: ignore
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(isinstance(child, Conv1D) for child in module.modules())  # pyright: ignore
    return config


def inject_alone(config: PeftConfig, module: nn.Module, seed: int) -> tuple[BaseTuner, dict[str, Tensor]]:
    """Inject ``config`` into a small ``module`` of one layer, for measurements; its warnings have been seen before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _inject(config, module, seed, False, "adapter.target_modules", [])


def _inject(
    config: PeftConfig, module: nn.Module, seed: int, meta: bool, setting: str, names: list[str]
) -> tuple[BaseTuner, dict[str, Tensor]]:
    see_quantised_layers()
    before = {id(tensor): tensor for tensor in named_tensors(module).values()}
    weights = {} if meta else _checksums(before)
    tuner_class: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]  # pyright: ignore
    try:
        with seeded(seed, meta):
            tuner = tuner_class(module, config, ADAPTER_NAME)
    except RuntimeError as error:
        if meta:
            raise WeightsNeededError(str(error)) from error
        raise InputError(_refused(error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError) as error:
        if _matched_nothing(error):
            linear = ", ".join(sorted({name.split(".")[-1] for name in names}))
            raise InputError(
                f"{setting} matches no layer of this backbone. Its linear layers are named: {linear}. "
                "Use adapter.target_modules=attention, all-linear or some of these names."
            ) from error
        raise InputError(_refused(error)) from error
    if not meta and _checksums(before) != weights:
        raise InputError(
            "adapter.config changes the backbone's own weights at the start (as PiSSA, OLoRA and CorDA do), so the "
            "frozen backbone would no longer be the same everywhere. Choose another initialisation, such as "
            "adapter.config.init_lora_weights=true."
        )
    return tuner, {name: tensor for name, tensor in named_tensors(tuner).items() if id(tensor) not in before}


@contextmanager
def seeded(seed: int, meta: bool = False) -> Iterator[None]:
    """Draw from ``seed`` inside, and leave the global generator as it was; ``meta`` makes new tensors shapes only."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "adapter"))
        with torch.device("meta" if meta else "cpu"):
            yield


@contextmanager
def logged_warnings() -> Iterator[None]:
    """Write PEFT's warnings into the run's log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        log.warning("peft: %s", message)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _checksums(tensors: dict[int, Tensor]) -> dict[int, int]:
    """One number for each tensor: its bits summed as integers of eight bytes, much faster than its numbers in fp64."""
    return {key: _bits(value.detach()) for key, value in tensors.items()}


def _bits(tensor: Tensor) -> int:
    flat = tensor.reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // 8 * 8
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())


def _holds(layer: BaseTunerLayer) -> bool:
    """Whether the layer is adapted, and not a wrapper inside another one."""
    return getattr(layer, "base_layer", None) is not None


def plain_name(name: str) -> str:
    """PEFT's name without the path to the model and the adapter name."""
    head, _, tail = name.removeprefix("model.").rpartition(f".{ADAPTER_NAME}")
    return head + tail if head and (not tail or tail.startswith(".")) else name.removeprefix("model.")


def _shown(adapter: Adapter, config: PeftConfig) -> str:
    targets = adapter.config.target_modules
    if targets is None:
        targets = getattr(config, "target_modules", None)
    shown = sorted(targets) if isinstance(targets, set) else targets
    return f"{shown!r}"


def _matched_nothing(error: Exception) -> bool:
    text = str(error)
    return any(part in text for part in ("not found in the base model", "No modules were targeted", "Please specify `"))


def _refused(error: Exception) -> str:
    return f"PEFT refuses this adapter: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
