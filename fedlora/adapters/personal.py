"""The seam of adapters beside private models: what clients of any architecture share, and how they train around it.

An ordinary adapter changes the layers of a backbone that all clients have. These have nothing in common but the width
of their features, so what is shared stands beside their models (:class:`SharedPart`), and a round may have phases in
which one of the two is trained and the other rests.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn

from fedlora.adapters.base import Adapter, AdapterConfig, Affinity, Phase, Place, State
from fedlora.errors import InputError

PREFIX = "adapter."
"""What the names of shared tensors start with, beside a model."""
WIDE = 2**20
"""More features than any model has."""


class PersonalConfig(AdapterConfig):
    """Settings of an adapter beside private models: no layers are chosen, and the classifier belongs to the model."""

    target_modules: list[str] | str | None = None
    head: Literal["shared", "private", "frozen"] = "private"


def phase(
    trains: Literal["private", "shared", "all"],
    loss: Callable[[Any, Callable[[Tensor], Tensor], Mapping[str, Tensor]], Tensor],
) -> Phase:
    """A phase that trains the private model, the shared part, or all that the client has.

    ``loss`` is called with the outputs (features ``[b, width]``, own logits ``[b, classes]``) of a batch, a function
    that gives the task's loss of any logits, and the batch.
    """

    def mean_loss(task: Any, module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return loss(module(**task.inputs(batch)), lambda logits: task.loss(_Said(logits), batch), batch)

    return Phase(trains, mean_loss)


class _Said(nn.Module):
    """A model that has already said ``logits``."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Tensor) -> _Said:
        return self


class SharedPart(nn.Module):
    """What all clients share; this one is empty: clients train their models and answer with them."""

    summarises: ClassVar[bool] = False
    """Whether it is computed from the client's rows after training (:meth:`summary`) instead of being trained."""

    def logits(self, features: Tensor, own: Tensor) -> Tensor:
        """The answer ``[b, classes]``, from features ``[b, width]`` and the client's own logits ``[b, classes]``."""
        return own

    def phases(self) -> tuple[Phase, ...]:
        """How a client trains in a round, in order, each phase on the same batches."""
        return (Phase("all"),)

    def summary(self, features: Tensor, targets: Tensor) -> State:
        """What travels, by parameter name, from the features ``[n, width]`` and classes ``[n]`` of a client's rows."""
        raise NotImplementedError


class PersonalAdapter(Adapter):
    """An adapter beside the private models of ``backbone=heterogeneous``."""

    Config = PersonalConfig

    @abstractmethod
    def part(self, width: int, classes: int) -> SharedPart:
        """The shared part for features of ``width``; what it draws comes from the global generator."""

    def phases(self) -> tuple[Phase, ...]:
        """Those of the shared part, which are the same for every size."""
        with torch.device("meta"):
            return self.part(WIDE, 2).phases()

    def peft_config(self) -> PeftConfig:
        """Asked for by every other backbone.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"adapter={self.config.name} stands beside models that clients have of their own, and changes no layer of "
            "a common backbone. Use backbone=heterogeneous, or another adapter."
        )

    def trains(self, key: str, tensor: Tensor) -> bool:
        """Everything is trained."""
        return True

    def place(self, key: str, tensor: Tensor) -> Place:
        """The shared part travels, the models do not."""
        return "shared" if key.startswith(PREFIX) else "private"

    def check(self, layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Any model will do."""

    def affinity(self, layers: Mapping[str, Any]) -> Affinity:
        """No layer is changed, so nothing is affine in it."""
        return Affinity(False)
