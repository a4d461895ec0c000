"""The canary of a private run: a first training that did not move what it should, or moved more, is not released.

Noise moves whatever it is added to. So a trained tensor that stays where it was has got none, and a frozen one that
moved was trained without anybody having clipped its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.model import AdaptedModel

if TYPE_CHECKING:
    from fedlora.cohort import Member, Trained

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Canary:
    """Remembers what is frozen before clients train, and looks at everything afterwards."""

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        self._before = self._frozen()

    def check(self, members: Sequence[Member], trained: Sequence[Trained]) -> None:
        """See that ``trained`` is what private training makes of ``members``; who failed is left out.

        Raises:
            FedloraError: naming the tensor and the client.
        """
        name = self.model.adapter.label
        after = self._frozen()
        if moved := [key for key, value in self._before.items() if after[key] != value]:
            raise FedloraError(
                f"'{moved[0]}' is frozen, and private training of adapter={name} has changed it: nothing is released. "
                "Use another adapter, or privacy=none."
            )
        for member, result in zip(members, trained, strict=True):
            mechanism = member.privacy
            assert mechanism is not None
            noised = {key for step in range(mechanism.steps) for key in self.model.in_step(step, member.keys)}
            for key in result.state.keys() & member.state.keys():
                rests = result.state[key].equal(member.state[key])
                if rests and key in noised and mechanism.noise_multiplier:
                    raise FedloraError(
                        f"'{key}' of client '{member.client}' is trained, and the noise of privacy=record has not "
                        f"moved it: nothing is released. Raise client.lr if it is tiny, or do not use adapter={name}."
                    )
                if not rests and key not in noised:
                    raise FedloraError(
                        f"'{key}' of client '{member.client}' rests in this round, and private training of "
                        f"adapter={name} has changed it: nothing is released. Use another adapter, or privacy=none."
                    )

    def _frozen(self) -> dict[str, int]:
        """A sum of the bits of every tensor that is the same for all clients."""
        model = self.model
        of_clients = {id(parameter) for parameter in model.parameters(model.per_client)}
        named = {name: p for name, p in model.module.named_parameters() if id(p) not in of_clients}
        return {name: _sum_of_bits(tensor) for name, tensor in named.items()} | {
            key: _sum_of_bits(tensor) for key, tensor in model.read(model.frozen).items()
        }


def _sum_of_bits(tensor: Tensor) -> int:
    return int(tensor.detach().reshape(-1).view(INTEGERS[tensor.itemsize]).sum(dtype=torch.int64))
