"""Private models with a shared part beside them, in the terms of :class:`~fedlora.model.AdaptedModel`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fedlora.adapters.base import Adapter, Phase
from fedlora.adapters.injection import seeded
from fedlora.adapters.personal import PREFIX, PersonalAdapter
from fedlora.capability import WHOLE, Capability
from fedlora.errors import FedloraError, InputError
from fedlora.model import AdaptedModel, Value
from fedlora.packing import Packer
from fedlora.personal.private_models import PrivateModels

MODELS = "models."


class PersonalModel(AdaptedModel):
    """Every private model of a run, of which a client holds one, and the shared part.

    Keys are ``adapter.<name>`` for what is shared and ``models.<model>.<name>`` for the rest. A client's state has the
    tensors of one model; loading it makes that model the one that runs. A model that all clients have may travel whole
    (``adapter=full``); different ones have no tensors in common, and stay.
    """

    def __init__(self, module: PrivateModels, adapter: Adapter, seed: int = 0) -> None:
        """Put the shared part of ``adapter`` beside the models of ``module``; it is drawn from ``seed``.

        Raises:
            InputError: the adapter changes the layers of a common backbone, which there is not.
        """
        if not isinstance(adapter, PersonalAdapter):
            raise InputError(
                f"adapter={adapter.label} changes the layers of a backbone that all clients have, and with "
                "backbone=heterogeneous there is none. Use method=pfedlora, fedproto or local_full."
            )
        self.adapter, self.seed = adapter, seed
        with seeded(seed, meta=next(module.parameters()).is_meta):
            module.adapter = adapter.part(module.width, module.classes)
        self.module = self.models = module.eval()
        self.layers, self.head, self.rounds, self.own, self.frozen = {}, (), (), (), ()
        self._tensors: dict[str, Tensor] = dict(module.named_parameters())
        one = len(module.models) == 1
        self.packer = Packer(module if one else module.adapter)  # what it packs is measured on one model
        self.shared = tuple(
            key for key, tensor in self._tensors.items()
            if adapter.place(key, tensor) == "shared" and (one or key.startswith(PREFIX))
        )  # fmt: skip
        self.private = tuple(key for key in self._tensors if key not in self.shared)
        self._corrections = {}
        self.own_trainables()

    def trains(self, parts: Iterable[str] = (), capability: Capability = WHOLE) -> tuple[str, ...]:
        """What a client of ``capability`` holds and trains; without a model of its own, it has the only one there is.

        Raises:
            FedloraError: there are no factors to choose from, or no such model, or several.
        """
        if tuple(parts):
            raise FedloraError(f"{sorted(parts)} is no trained factor; adapter={self.adapter.label} is trained whole")
        names = (capability.model,) if capability.model else tuple(self.models.models)
        if len(names) != 1 or names[0] not in self.models.models:
            raise FedloraError(f"a client trains one of the models {list(self.models.models)}, not {list(names)}")
        return tuple(key for key in self.trainable if model_of(key) in (None, names[0]))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those of the shared part, whose losses see its tensors."""
        return self.models.adapter.phases()

    def held(self, values: dict[str, Value], capability: Capability) -> dict[str, Value]:
        """What of ``values``, one for each trained key, a client holds: its model, and what is shared."""
        return {key: values[key] for key in self.trains(capability=capability)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` into the model in place, and run from now on the model whose tensors are its first."""
        super().load(state)
        self.models.current = next(filter(None, map(model_of, state)), self.models.current)


def model_of(key: str) -> str | None:
    """The model that a tensor belongs to; ``None`` for what is shared beside the models."""
    return key.split(".")[1] if key.startswith(MODELS) else None
