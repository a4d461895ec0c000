"""``backbone=heterogeneous``: no pretrained model that all share, but a private model of its own for every client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from fedlora.backbone import Backbone
from fedlora.config import BackboneConfig
from fedlora.errors import InputError
from fedlora.personal.private_models import PrivateModels, build_private_models, names_of


@dataclass(frozen=True)
class HeterogeneousBackbone(Backbone):
    """The models that clients have, in turn in the order of their sorted ids: client i has model i mod their number."""

    @classmethod
    def from_config(cls, config: BackboneConfig) -> HeterogeneousBackbone:
        """Check the names in ``backbone.models``.

        Raises:
            InputError: there is none, or one is not known.
        """
        names_of(config.models)
        return cls(config, None)

    @property
    def client_models(self) -> list[str]:
        """Names of the models, to be taken in turn."""
        return names_of(self.settings.models)

    @property
    def any_picture(self) -> bool:
        """The models are built for the pictures of the data."""
        return True

    @property
    def described(self) -> str:
        """How messages call it."""
        return f"backbone.models = {self.settings.models}"

    @property
    def has_tokenizer(self) -> bool:
        """Pictures have none."""
        return False

    def config(self, **overrides: Any) -> PretrainedConfig:
        """An empty configuration: the models are no transformers."""
        return PretrainedConfig()

    def max_length(self) -> int | None:
        """Pictures have no length."""
        return None

    def load(
        self,
        auto_class: Any,
        seed: int,
        *,
        quantized: bool = True,
        heads: Iterable[str] = (),
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> PrivateModels:
        """Every model with weights drawn from ``seed``; see :meth:`Backbone.load`.

        Raises:
            InputError: a model does not fit, the task has no pictures, or the precision is not fp32.
        """
        if dtype != torch.float32:
            raise InputError(
                "precision is that of frozen weights, and backbone=heterogeneous has none: every client trains its own "
                "model in fp32. Set precision=fp32."
            )
        return self._build(seed, "cpu", overrides)

    def meta(self, auto_class: Any, **overrides: Any) -> PrivateModels:
        """The models on the meta device: shapes without weights."""
        return self._build(0, "meta", overrides)

    def _build(self, seed: int, device: str, overrides: dict[str, Any]) -> PrivateModels:
        picture = overrides.get("picture")
        if picture is None:
            raise InputError(
                "backbone=heterogeneous has models of pictures: choose task=image_classification and data with "
                "pictures, such as data=mnist."
            )
        models, width = self.settings.models, self.settings.width
        return build_private_models(models, picture, int(overrides["num_labels"]), width, seed, device)
