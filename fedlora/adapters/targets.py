"""Which layers an adapter goes into: presets found in the structure of the model, names, suffixes, expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
PRESETS = ("attention", "all-linear")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def resolve_targets(targets: list[str] | str | None, module: nn.Module, heads: Iterable[str]) -> list[str] | str | None:
    """Turn ``adapter.target_modules`` into what PEFT understands.

    ``attention`` is every linear layer inside an attention block, which is found by its name on the way to the layer
    (``attention`` in BERT and ViT, ``self_attn`` in Llama, ``attn`` in GPT-2). ``all-linear`` is every linear layer but
    the task head and the output embeddings. Both become full module names. A plain word is a suffix; anything else that
    is a string stays a regular expression over full names, a list stays a list, ``None`` PEFT's default.

    Args:
        targets: the setting.
        module: the model, real or on the meta device, before injection.
        heads: top-level modules of the task head.
    """
    if targets == "attention":
        return [name for name in linear_layers(module, heads) if any(map(_ATTENTION.search, name.split(".")[:-1]))]
    if targets == "all-linear":
        return linear_layers(module, heads)
    return [targets] if isinstance(targets, str) and is_suffix(targets) else targets


def is_suffix(targets: str) -> bool:
    """Whether a string is the end of module names, such as ``query`` or ``output.dense``, and no expression."""
    return re.fullmatch(r"[\w.]+", targets) is not None


def linear_layers(module: nn.Module, heads: Iterable[str] = ()) -> list[str]:
    """Names of the linear layers (quantised ones too) outside the task head and the output embeddings."""
    outside = tuple(heads)
    embeddings = getattr(module, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, LINEAR) and name.split(".")[0] not in outside and child is not embeddings
    ]
