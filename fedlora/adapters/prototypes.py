"""FedProto (Tan et al., AAAI 2022, arXiv 2105.00243): clients share the mean features of every class, no weights.

A client trains its model with CE(F_k(x), y) + lambda MSE(h_k(x), C_y), where C_y is the global prototype of class y
once there is one, and answers with its own classifier. Then it sends, for every class of the data, the mean of its
rows' features and their number (0 for classes that it lacks, whose zeros travel too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from fedlora.adapters.base import AdapterConfig, Phase, State, register
from fedlora.adapters.personal import PersonalAdapter, PersonalConfig, SharedPart, phase


class PrototypesConfig(PersonalConfig):
    """FedProto's settings.

    Attributes:
        weight: lambda, of the distance to the prototypes in the loss.
    """

    weight: Annotated[float, Field(gt=0)]


class ClassPrototypes(SharedPart):
    """``means [classes, width]`` of the features of each class, over ``counts [classes]`` rows."""

    summarises: ClassVar[bool] = True

    def __init__(self, width: int, classes: int, weight: float) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.zeros(classes, width))
        self.counts = nn.Parameter(torch.zeros(classes))
        self.weight = weight

    def phases(self) -> tuple[Phase, ...]:
        """The private model; prototypes are computed, not trained."""
        return (phase("private", self._loss),)

    def _loss(self, outputs: Any, loss_of: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        targets = batch["target"]
        known = (self.counts[targets] > 0).float()[:, None]  # a class that nobody has seen yet draws nothing
        distance = (known * (outputs.features - self.means[targets]).square()).mean()
        return loss_of(outputs.own) + self.weight * distance

    def summary(self, features: Tensor, targets: Tensor) -> State:
        """The mean features of each class; zeros where there is no row."""
        counts = torch.zeros_like(self.counts).index_add(0, targets, torch.ones_like(features[:, 0]))
        sums = torch.zeros_like(self.means).index_add(0, targets, features)
        return {"means": sums / counts.clamp(min=1)[:, None], "counts": counts}


@register("prototypes")
class Prototypes(PersonalAdapter):
    """Class prototypes beside private models."""

    Config = PrototypesConfig

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.settings = cast(PrototypesConfig, config)

    def part(self, width: int, classes: int) -> ClassPrototypes:
        """Of no rows yet."""
        return ClassPrototypes(width, classes, self.settings.weight)
