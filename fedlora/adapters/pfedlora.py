"""pFedLoRA (Yi et al. 2023, arXiv 2310.13283): one small low-rank adapter shared by clients with different models.

The adapter theta stands on the features h of a client's private model omega_k, beside its own classifier F_k. In every
round a client trains omega_k with theta at rest, then theta with omega_k at rest, on the same batches:

    phase 1   (1 - mu) CE(F_k(x), y) + mu CE(theta(h_k(x)), y)
    phase 2   CE(theta(h_k(x)), y)

and sends theta alone. What the paper leaves open here: theta is linear without biases, features -> rank -> classes,
and the answer of a client is (1 - mu) F_k(x) + mu theta(h_k(x)), logits mixed as the losses are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, cast

from pydantic import Field
from torch import Tensor, nn

from fedlora.adapters.base import AdapterConfig, Phase, register
from fedlora.adapters.personal import PersonalAdapter, PersonalConfig, SharedPart, phase
from fedlora.errors import InputError
from fedlora.lowrank import LowRank


class PFedLoRAConfig(PersonalConfig):
    """pFedLoRA's settings.

    Attributes:
        rank: of the shared adapter.
        mu: weight of the shared adapter, in the loss of the private model and in the answer.
    """

    rank: Annotated[int, Field(ge=1)]
    mu: Annotated[float, Field(gt=0, lt=1)]


class CommonAdapter(SharedPart):
    """theta(h) = U D h: ``down.weight`` D ``[rank, width]``, ``up.weight`` U ``[classes, rank]``."""

    def __init__(self, width: int, rank: int, classes: int, mu: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, classes, bias=False)
        self.mu = mu

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[b, classes]`` of features ``[b, width]``."""
        return self.up(self.down(features))

    def logits(self, features: Tensor, own: Tensor) -> Tensor:
        """(1 - mu) own + mu theta(features)."""
        return (1 - self.mu) * own + self.mu * self(features)

    def phases(self) -> tuple[Phase, ...]:
        """The private model, then the adapter."""
        return phase("private", self._mixed_loss), phase("shared", self._adapter_loss)

    def _mixed_loss(self, outputs: Any, loss_of: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return (1 - self.mu) * loss_of(outputs.own) + self.mu * loss_of(self(outputs.features))

    def _adapter_loss(self, outputs: Any, loss_of: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return loss_of(self(outputs.features))


@register("pfedlora")
class PFedLoRA(PersonalAdapter):
    """A product of two trained layers: the mean of the factors is not the mean of the products."""

    Config = PFedLoRAConfig

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.settings = cast(PFedLoRAConfig, config)

    def part(self, width: int, classes: int) -> CommonAdapter:
        """theta.

        Raises:
            InputError: the rank exceeds the features or the classes allow for.
        """
        rank = self.settings.rank
        if rank > width:
            raise InputError(f"adapter.rank = {rank} is larger than the {width} features of the models. Lower it.")
        return CommonAdapter(width, rank, classes, self.settings.mu)

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """The map theta = U D, ``[classes, width]``."""
        return {"adapter": LowRank(state["adapter.up.weight"], state["adapter.down.weight"])}
