"""FedProto (Tan et al., AAAI 2022, arXiv 2105.00243): the mean features of every class over all rows that have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from fedlora.adapters import State
from fedlora.adapters.prototypes import Prototypes
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from strategies.base import FederatedStrategy, Reply

MEANS, COUNTS = "adapter.means", "adapter.counts"


class FedProto(FederatedStrategy):
    """Personalised: no weights travel, so there is no dW to aggregate."""

    exact: ClassVar[bool | None] = None
    evaluation: ClassVar[Literal["global", "personal", "zero_shot"]] = "personal"

    def __init__(self) -> None:
        super().__init__()

    def prepare(self, model: AdaptedModel) -> None:
        """Needs prototypes beside private models."""
        if not isinstance(model.adapter, Prototypes):
            raise InputError(
                f"strategy=fedproto needs adapter=prototypes beside private models, not {model.adapter.label}. "
                "method=fedproto sets both, and backbone=heterogeneous."
            )

    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """C_j <- sum_k n_kj C_kj / sum_k n_kj; a class that no client of the round has keeps its prototype."""
        counts = torch.stack([reply.state[COUNTS] for reply in replies]).double()
        means = torch.stack([reply.state[MEANS] for reply in replies]).double()
        total = counts.sum(0)
        mean = ((counts[..., None] * means).sum(0) / total.clamp(min=1)[:, None]).float()
        seen = total > 0
        return {
            MEANS: torch.where(seen[:, None], mean, state[MEANS]),
            COUNTS: torch.where(seen, total.float(), state[COUNTS]),
        }
