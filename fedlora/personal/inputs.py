"""What private models read: pictures of one shape, or texts in the tokens of one vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Picture = tuple[int, int, int]
"""Channels, height and width."""
Inputs = Tensor | dict[str, Tensor]
"""Pictures ``[b, channels, h, w]``, or the arrays of texts by name, each ``[b, t]``."""
TOKENS = 8


@dataclass(frozen=True)
class Pictures:
    """Pictures of one shape; a user's class is called with it."""

    argument: Picture
    name: ClassVar[str] = "picture"
    plural: ClassVar[str] = "pictures"

    def __str__(self) -> str:
        return f"pictures of shape {list(self.argument)}"

    def example(self, device: torch.device) -> Inputs:
        """Two empty pictures ``[2, channels, h, w]``."""
        return torch.zeros(2, *self.argument, device=device)


@dataclass(frozen=True)
class Texts:
    """Texts as token ids below the size of the vocabulary; a user's class is called with that."""

    argument: int
    name: ClassVar[str] = "vocabulary"
    plural: ClassVar[str] = "texts"

    def __str__(self) -> str:
        return f"texts of {self.argument} different tokens"

    def example(self, device: torch.device) -> Inputs:
        """Two texts of the first token alone: ``input_ids`` and ``attention_mask`` ``[2, t]``."""
        ids = torch.zeros(2, TOKENS, dtype=torch.long, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
