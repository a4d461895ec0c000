"""No work on padding: the blocks of a transformers model run on the real tokens of a batch only.

The model is called as ever, with a padded batch ``[b, t]``. Before its first block the hidden states are packed to
``[1, tokens]``, after its last one they are unpacked, so embeddings, positions, pooling and heads stay the model's own.
Where only the first token of each row is read in the end, as by a [CLS] classifier, the feed-forward part of the last
block runs on that token only. Whether all this gives the model's own numbers is measured on a few rows of the data,
not assumed; where it does not, the model runs padded, and says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlora.errors import FedloraError
from fedlora.packed_attention import NAME, PackedLayout, PickRows, SpreadRows, packed_sequences

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.4}
"""How far two ways to compute the same gradient may be apart, relative to its norm, before they count as different.

Sums in another order give 1e-5 in fp32, and up to 0.2 through thirty blocks in bf16; what is computed wrongly is off by
the size of the gradient itself.
"""


class Packer:
    """Hooks on a model that pack every padded batch which it is called with; off until :meth:`enable`.

    Attributes:
        enabled: whether batches are packed.
        layout: how the batch in flight is packed; ``None`` outside of a call and where nothing is padding.
        first_only: whether the last block is cut to the first token of each row.
    """

    def __init__(self, module: nn.Module) -> None:
        """Find the blocks of ``module`` and hook them."""
        self.module = module
        self.enabled = False
        self.first_only = False
        self.layout: PackedLayout | None = None
        self.rows: int | None = None
        self._running: Any = None
        self._attentions: list[tuple[Any, Any]] = []
        self.cut_point: nn.Module | None = None
        self.blocks = _blocks(module)
        if self.blocks is None:
            return
        self._inside = set(self.blocks.modules())
        module.register_forward_pre_hook(self._begin, with_kwargs=True)
        module.register_forward_hook(self._end, always_call=True)
        for block in self.blocks:
            block.register_forward_pre_hook(self._pack, with_kwargs=True)
        self.blocks[-1].register_forward_hook(self._unpack)
        self.cut_point = _cut_point(self.blocks[-1])
        if self.cut_point is not None:
            self.cut_point.register_forward_pre_hook(self._cut)

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states."""
        assert self.blocks is not None
        return next(p.dtype for p in self.blocks[0].parameters() if p.is_floating_point())

    def inside(self, layer: nn.Module) -> bool:
        """Whether ``layer`` belongs to a block, and so sees packed tokens."""
        return self.blocks is not None and layer in self._inside

    # Hooks ---------------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        caching = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
        if not self.enabled or caching or not isinstance(mask, Tensor) or mask.ndim != 2:
            return
        real = mask.bool()
        if not (real[:, 0].all() and (real[:, 1:] <= real[:, :-1]).all()):
            return  # padded on the left, or empty rows
        self.rows = len(mask)
        if real.all() and (mask.is_cuda or self.dtype == torch.float32):
            return  # nothing to skip; in bf16 the packed attention is faster on the CPU in any case
        self.layout = PackedLayout(mask, rounded=self.dtype == torch.bfloat16 and not mask.is_cuda)
        self._attentions = [(config, config._attn_implementation_internal) for config in _configs(module)]
        for config, _ in self._attentions:
            config._attn_implementation_internal = NAME
        self._running = packed_sequences(self.layout)
        self._running.__enter__()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
        for config, before in self._attentions:
            config._attn_implementation_internal = before
        self.layout = self.rows = self._running = None
        self._attentions = []

    def _pack(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.layout is None:
            return None
        packed = tuple(self._packed(value) for value in args)
        return packed, {name: self._packed(value) for name, value in kwargs.items()}

    def _packed(self, value: Any) -> Any:
        """Whatever has a value for each token ``[b or 1, t, f]`` as ``[1, size, f]``; everything else as it is."""
        layout = self.layout
        assert layout is not None
        if isinstance(value, tuple):
            return tuple(self._packed(part) for part in value)
        width = layout.shape[1]
        if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[1] != width:
            return value
        if value.shape[0] == 1:
            return functional.pad(value[0].index_select(0, layout.real % width), (0, 0, 0, layout.spare))[None]
        return PickRows.apply(value.flatten(0, 1), layout.real, layout.spare)[None]  # pyright: ignore

    def _cut(self, module: nn.Module, args: Any) -> Any:
        if not self.first_only or self.rows is None:
            return None
        if self.layout is None:
            return tuple(value[:, :1] for value in args)
        starts = self.layout.starts
        return tuple(PickRows.apply(value[0], starts)[None] for value in args)  # pyright: ignore

    def _unpack(self, block: nn.Module, args: Any, output: Any) -> Any:
        layout = self.layout
        if layout is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        rows, width = layout.shape
        if self.first_only:
            whole = hidden.transpose(0, 1)
        else:
            whole = SpreadRows.apply(hidden[0][: layout.tokens], layout.real, rows * width).view(rows, width, -1)  # pyright: ignore
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    @contextmanager
    def using(self, enabled: bool, first_only: bool = False) -> Iterator[None]:
        """Pack, or do not, inside."""
        before = self.enabled, self.first_only
        self.enabled, self.first_only = enabled, first_only
        try:
            yield
        finally:
            self.enabled, self.first_only = before


def choose(packer: Packer, run: Callable[[], dict[str, Tensor]], pooled: bool) -> str | None:
    """Pack the batches of a model from now on if that gives its own numbers.

    Args:
        packer: that of the model.
        run: calls the model on a few rows of unequal length and returns every number that must stay the same, the
            gradients among them; called two or three times.
        pooled: nothing but the model's pooled output is ever read; then the last block may be cut.

    Returns:
        Why the model runs padded, or ``None``.
    """
    if packer.blocks is None:
        return "it has no single list of blocks"
    if any(getattr(block, "gradient_checkpointing", False) for block in packer.blocks):
        return "gradient checkpointing runs the blocks again in the backward pass"
    read: list[Tensor] = []
    last = packer.blocks[-1].register_forward_hook(lambda *call: _keep_gradient(call[2], read))
    try:
        with packer.using(False):
            expected = run()
    finally:
        last.remove()
    reason = _difference(packer, False, expected, run)
    packer.enabled = reason is None
    if pooled and packer.enabled and packer.cut_point is not None and _reads_first_only(read):
        packer.first_only = _difference(packer, True, expected, run) is None
    return reason


def _difference(packer: Packer, first_only: bool, expected: dict[str, Tensor], run: Any) -> str | None:
    try:
        with packer.using(True, first_only):
            found = run()
    except (FedloraError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"its attention cannot be packed ({str(error).strip().splitlines()[0]})"
    for name, value in expected.items():
        if differs(value, found[name], packer.dtype):
            return f"packing changes its numbers ({name})"
    return None


def differs(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether two values are more than rounding of ``dtype`` apart; a value that is not finite differs."""
    return not float((expected - found).norm()) <= TOLERANCE[dtype] * max(float(expected.norm()), 1e-4)


def _keep_gradient(output: Any, read: list[Tensor]) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.retain_grad()
        read.append(hidden)


def _reads_first_only(outputs: list[Tensor]) -> bool:
    """Whether of every output ``[b, t, d]`` of the last block the first token, and it alone, had a gradient."""
    touched = [value.grad.abs().sum(2) > 0 for value in outputs if value.grad is not None and value.grad.ndim == 3]
    return bool(touched) and all(bool(t[:, 0].all()) and not bool(t[:, 1:].any()) for t in touched)


def _blocks(module: nn.Module) -> nn.ModuleList | None:
    """The one list of equal blocks that hidden states go through."""
    lists = [
        child
        for child in module.modules()
        if isinstance(child, nn.ModuleList)
        and len({type(block) for block in child}) == 1
        and isinstance(child[0], GradientCheckpointingLayer)
    ]
    return lists[0] if len(lists) == 1 else None


def _cut_point(block: nn.Module) -> nn.Module | None:
    """The module of a BERT-like block behind which each token goes its own way: it takes (attention, residual)."""
    point = getattr(getattr(block, "attention", None), "output", None)
    if not isinstance(point, nn.Module):
        return None
    return point if list(inspect.signature(point.forward).parameters) == ["hidden_states", "input_tensor"] else None


def _configs(module: nn.Module) -> list[Any]:
    """Every configuration object that the model's modules hold, each once."""
    found = {id(child.config): child.config for child in module.modules() if hasattr(child, "config")}
    return list(found.values())
