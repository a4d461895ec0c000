"""Attention over the real tokens of a batch: sequences lie one after the other, none pays for another's length.

Registered with transformers as the attention implementation ``fedlora_packed``, so that no model is rewritten. Each
sequence is padded to a bucket of its own length only, inside the attention, so its numbers do not depend on what else
is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from fedlora.errors import FedloraError

NAME = "fedlora_packed"
MANY, FINE, COARSE = 1024, 32, 128
"""Sizes of packed batches are rounded up to multiples of 32, and from 1,024 tokens on of 128."""
UNSUPPORTED = ("softcap", "position_bias", "s_aux", "cache", "head_mask")
"""Arguments of an attention that this one does not know: a model that gives them is not packed."""


@dataclass(frozen=True)
class Bucket:
    """Sequences that are padded to the same length inside the attention.

    Attributes:
        count: sequences.
        length: tokens of each after padding.
        mask: which keys are real ``[count, 1, 1, length]``; ``None`` where all are.
    """

    count: int
    length: int
    mask: Tensor | None


class PackedLayout:
    """Where the tokens of a padded batch ``[b, t]`` lie in its packed form ``[1, tokens]``.

    Attributes:
        shape: ``(b, t)`` of the padded batch.
        real: the places of the real tokens in the flattened padded batch ``[tokens]``.
        lengths: real tokens of each sequence ``[b]``, on the CPU.
        spare: rows of zeros after the real tokens, so that batches have few different sizes.
    """

    def __init__(self, mask: Tensor, rounded: bool = False) -> None:
        """``mask``: 1 where a token is real ``[b, t]``; the real tokens of a row are its first ones.

        ``rounded``: add spare rows. oneDNN, which multiplies bf16 on the CPU, compiles a kernel for every size that it
        has not seen, and keeps it.
        """
        self.shape = (int(mask.shape[0]), int(mask.shape[1]))
        self.device = mask.device
        self.lengths = mask.sum(1).cpu()
        self.real = mask.flatten().nonzero()[:, 0]
        unit = FINE if self.tokens < MANY else COARSE
        self.spare = -self.tokens % unit if rounded else 0

    @property
    def tokens(self) -> int:
        """Real tokens of the batch."""
        return len(self.real)

    @property
    def size(self) -> int:
        """Rows of the packed batch: its tokens and the spare rows."""
        return self.tokens + self.spare

    @property
    def starts(self) -> Tensor:
        """The packed place of each sequence's first token ``[b]``."""
        return (torch.cumsum(self.lengths, 0) - self.lengths).to(self.device)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The buckets in the order of :attr:`slots`."""
        return self._plan[0]

    @cached_property
    def slots(self) -> Tensor:
        """For every slot of all buckets the packed token in it; a padding slot repeats token 0 ``[slots]``."""
        return self._plan[1]

    @cached_property
    def places(self) -> Tensor:
        """The slot of every packed token ``[tokens]``."""
        return self._plan[2]

    @cached_property
    def _plan(self) -> tuple[list[Bucket], Tensor, Tensor]:
        lengths = self.lengths
        padded = bucket_length(lengths)
        starts = torch.cumsum(lengths, 0) - lengths
        buckets, slots, places = [], [], torch.empty(self.tokens, dtype=torch.long)
        offset = 0
        for length in padded.unique().tolist():
            members = (padded == length).nonzero()[:, 0]
            real = torch.arange(length) < lengths[members, None]
            tokens = torch.where(real, starts[members, None] + torch.arange(length), 0).flatten()
            mask = None if bool(real.all()) else real[:, None, None, :].to(self.device)
            places[tokens[real.flatten()]] = offset + real.flatten().nonzero()[:, 0]
            offset += len(tokens)
            buckets.append(Bucket(len(members), length, mask))
            slots.append(tokens)
        return buckets, torch.cat(slots).to(self.device), places.to(self.device)


def bucket_length(lengths: Tensor) -> Tensor:
    """The padded length of sequences: the next multiple of an eighth of the power of two above, at least 8."""
    step = torch.exp2(torch.ceil(torch.log2(lengths.clamp(min=1).double())) - 3).clamp(min=8).long()
    return (lengths + step - 1) // step * step


class _ToSlots(torch.autograd.Function):
    """Packed rows ``[size, f]`` into slots ``[slots, f]``; no gradient comes from padding slots, which are masked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.spare = len(x) - len(places)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _picked(gradients[0], places, ctx.spare), None, None


class SpreadRows(torch.autograd.Function):
    """Rows ``[k, f]`` at distinct places of ``[size, f]``, zeros elsewhere; its opposite is ``index_select``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        """Spread the rows of ``x``."""
        ctx.save_for_backward(places)
        return x.new_zeros(size, x.shape[1]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Pick them up again."""
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class PickRows(torch.autograd.Function):
    """Rows of ``x [size, f]`` at distinct ``places [k]``, then ``spare`` zeros: its gradient is a copy, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, spare: int = 0) -> Tensor:
        """Pick the rows."""
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return _picked(x, places, spare)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Spread their gradients."""
        (places,) = ctx.saved_tensors
        zeros = gradients[0].new_zeros(ctx.size, gradients[0].shape[1])
        return zeros.index_copy_(0, places, gradients[0][: len(places)]), None, None


def _picked(x: Tensor, places: Tensor, spare: int) -> Tensor:
    if not spare:
        return x.index_select(0, places)
    rows = x.new_empty(len(places) + spare, x.shape[1])
    torch.index_select(x, 0, places, out=rows[: len(places)])
    rows[len(places) :] = 0
    return rows


_current: PackedLayout | None = None


@contextmanager
def packed_sequences(layout: PackedLayout) -> Iterator[None]:
    """Let the attention know how the tokens of the model that runs inside are packed."""
    global _current
    before, _current = _current, layout
    try:
        yield
    finally:
        _current = before


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed sequences, in the signature of transformers' interface.

    Args:
        module: the attention layer.
        query: ``[1, heads, tokens, d]``.
        key: ``[1, groups, tokens, d]``.
        value: ``[1, groups, tokens, d]``.
        attention_mask: unused; every sequence sees itself only.
        dropout: of attention weights.
        scaling: of the products; ``None``: 1 / sqrt(d).
        is_causal: whether a token sees only what is before it; ``None``: as the module says.
        sliding_window: how far back a token sees.
        kwargs: what other implementations take.

    Returns:
        ``[1, tokens, heads, d]``, and no weights.

    Raises:
        FedloraError: the attention has a term that is not known here.
    """
    layout = _current
    strange = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if layout is None or strange or (sliding_window is not None and int(layout.lengths.max()) > sliding_window):
        raise FedloraError(f"attention with {(strange or ['sliding_window'])[0]} cannot be packed")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    heads, groups = query.shape[1], key.shape[1]
    q, k, v = (_slotted(x, layout) for x in (query, key, value))
    sizes = [bucket.count * bucket.length for bucket in layout.buckets]
    outputs = []
    for bucket, *parts in zip(layout.buckets, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        qb, kb, vb = (part.view(bucket.count, bucket.length, -1, query.shape[-1]).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(
            qb,
            kb,
            vb,
            attn_mask=None if causal else bucket.mask,  # padding comes last, and no token sees what is after it
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=heads != groups,
        )
        outputs.append(attended.transpose(1, 2).reshape(bucket.count * bucket.length, -1).to(query.dtype))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return PickRows.apply(joined, layout.places, layout.spare).view(1, layout.size, heads, -1), None  # pyright: ignore


def _slotted(x: Tensor, layout: PackedLayout) -> Tensor:
    """``[1, heads, tokens, d]`` as slots ``[slots, heads * d]``."""
    rows = x.transpose(1, 2).reshape(layout.size, -1)
    slotted: Tensor = _ToSlots.apply(rows, layout.slots, layout.places)  # pyright: ignore[reportAssignmentType]
    return slotted if x.is_cuda else slotted.float()  # on the CPU attention in bf16 is many times slower than in fp32


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask of packed sequences: none, the attention knows."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
