"""Measure whether a PEFT method is affine in its trained tensors: then, and only then, a plain average is exact.

An average of states theta_k is exact iff f(mean theta) = mean f(theta) for the layer's map f. That is tried on one
small layer with four random states; an affine method is off by rounding (1e-7), any other by more than a tenth.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from functools import lru_cache
from typing import Any

import peft
import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.base import Affinity
from fedlora.adapters.injection import inject_alone
from fedlora.adapters.probe import features
from fedlora.encoded import cache_folder
from fedlora.errors import FedloraError
from fedlora.seeding import torch_generator

THRESHOLD = 1e-4
LARGEST = 512
_STATES, _ROWS, _SPREAD = 4, 64, 0.3


def affinity_of(config: PeftConfig, base: nn.Module) -> Affinity:
    """Measure ``config`` on a layer like ``base`` (real or meta, at most 512 features), or recall the answer.

    The answer is kept in memory and in the cache folder, under a key of PEFT's version, the configuration and the
    layer's kind and shape.
    """
    m, n = features(base)
    kind = next(kind for kind in ("Conv1D", "LayerNorm", "Linear") if isinstance(base, _KINDS[kind]))
    settings = json.dumps({**_plain(config), "target_modules": None}, sort_keys=True, default=_plain_value)
    return _recalled(settings, type(config).__name__, kind, m, n, _Held(config))


def measure_affine(config: PeftConfig, m: int, n: int, kind: str = "Linear") -> float:
    """Return ``‖f(mean θ) − mean f(θ)‖ / mean ‖f(θ) − f(θ0)‖`` on one layer of ``m`` outputs and ``n`` inputs.

    Four states θ lie at θ0 + 0.3 N(0, 1) around the start θ0; f is evaluated on 64 Gaussian inputs in fp32.

    Raises:
        InputError: PEFT refuses the configuration for such a layer, or it changes the layer's own weight.
    """
    generator = torch_generator(0, "affine")
    model = _OneLayer(_layer(kind, m, n, generator))
    tuner, new = inject_alone(_for_one_layer(config), model, 0)
    tuner.eval()
    trained = [tensor for tensor in new.values() if tensor.requires_grad]
    rows = torch.randn(_ROWS, n, generator=generator)
    with torch.no_grad():
        start = model.layer(rows)
        states = [[t + _SPREAD * torch.randn(t.shape, generator=generator) for t in trained] for _ in range(_STATES)]
        outputs = [_output(model.layer, rows, trained, state) for state in states]
        middle = _output(
            model.layer, rows, trained, [torch.stack(group).mean(0) for group in zip(*states, strict=True)]
        )
    size = torch.stack([(output - start).norm() for output in outputs]).mean()
    gap = (middle - torch.stack(outputs).mean(0)).norm()
    return float(gap / size) if size > 0 else 0.0


def _output(layer: nn.Module, rows: Tensor, trained: list[Tensor], state: list[Tensor]) -> Tensor:
    for tensor, value in zip(trained, state, strict=True):
        tensor.copy_(value)
    return layer(rows)


_KINDS: dict[str, type[nn.Module]] = {"Linear": nn.Module, "Conv1D": Conv1D, "LayerNorm": nn.LayerNorm}


class _OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _layer(kind: str, m: int, n: int, generator: torch.Generator) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        layer = {
            "Linear": lambda: nn.Linear(n, m),
            "Conv1D": lambda: Conv1D(m, n),
            "LayerNorm": lambda: nn.LayerNorm(n),
        }
        made = layer[kind]().requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / n**0.5)
    return made


def _for_one_layer(config: PeftConfig) -> PeftConfig:
    alone: Any = copy.deepcopy(config)
    alone.target_modules = {"layer"}
    for name in ("feedforward_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(alone, name):
            setattr(alone, name, set() if name == "feedforward_modules" else None)
    return alone


class _Held:
    """A configuration beside the key that stands for it: equal to any other."""

    def __init__(self, config: PeftConfig) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=64)
def _recalled(settings: str, name: str, kind: str, m: int, n: int, held: _Held) -> Affinity:
    key = "\x1f".join([peft.__version__, torch.__version__, name, settings, kind, str(m), str(n)])
    digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    path = cache_folder() / "affine" / f"{digest}.json"
    if path.exists():
        return Affinity(**json.loads(path.read_text()))
    try:
        error = _measured(held.config, kind, m, n)
        answer = Affinity(error < THRESHOLD, error)
    except FedloraError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError) as failure:
        answer = Affinity(False, reason=str(failure).strip().splitlines()[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(vars(answer)))
    temporary.replace(path)
    return answer


def _measured(config: PeftConfig, kind: str, m: int, n: int) -> float:
    """On a layer of at most :data:`LARGEST` features, or of the true size where the configuration needs it."""
    small = min(m, LARGEST), min(n, LARGEST)
    if small != (m, n):
        try:
            return measure_affine(config, *small, kind)
        except (FedloraError, RuntimeError, ValueError):
            pass
    return measure_affine(config, m, n, kind)


def _plain(config: PeftConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "base_model_name_or_path"}


def _plain_value(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else str(value)
