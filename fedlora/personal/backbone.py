"""``backbone=heterogeneous``: no pretrained model that all share, but a private model of its own for every client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from fedlora.backbone import Backbone
from fedlora.config import BackboneConfig
from fedlora.errors import InputError
from fedlora.personal.encoders import PretrainedEncoder
from fedlora.personal.inputs import Pictures, Texts
from fedlora.personal.private_models import PrivateModels, build_private_models, encoders_of, names_of


@dataclass(frozen=True)
class HeterogeneousBackbone(Backbone):
    """The models that clients have, in turn in the order of their sorted ids: client i has model i mod their number.

    Rows are encoded once, for all of them: ``path``, where the tokenizer lies, is that of the first encoder.
    """

    @classmethod
    def from_config(cls, config: BackboneConfig) -> HeterogeneousBackbone:
        """Check the names in ``backbone.models``.

        Raises:
            InputError: there is none, or one is not known.
        """
        names_of(config.models)
        encoders = encoders_of(config)
        return cls(config, encoders[0].path if encoders else None)

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

    def config(self, **overrides: Any) -> PretrainedConfig:
        """An empty configuration: there is no common one."""
        return PretrainedConfig()

    def max_length(self) -> int | None:
        """The longest sequence that all encoders can read; ``None`` where there are none, or they do not say."""
        known = [encoder.max_length() for encoder in encoders_of(self.settings)]
        return min((length for length in known if length is not None), default=None)

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
            InputError: a model does not fit, the task is no classification, or the precision is not fp32.
        """
        if dtype != torch.float32:
            raise InputError(
                "precision is that of frozen weights, and backbone=heterogeneous has none: every client trains its own "
                "model in fp32. Set precision=fp32."
            )
        return self._build(auto_class, seed, "cpu", overrides)

    def meta(self, auto_class: Any, **overrides: Any) -> PrivateModels:
        """The models on the meta device: shapes without weights."""
        return self._build(auto_class, 0, "meta", overrides)

    def _build(self, auto_class: Any, seed: int, device: str, overrides: dict[str, Any]) -> PrivateModels:
        classes = int(overrides.get("num_labels", 1))
        picture = overrides.get("picture")
        if picture is not None:
            return build_private_models(self.settings, Pictures(picture), classes, seed, device)
        if auto_class is not AutoModelForSequenceClassification or classes < 2:
            raise InputError(
                "backbone=heterogeneous has models that predict classes: choose task=classification with data of "
                "texts, or task=image_classification with data of pictures, such as data=mnist."
            )
        vocabulary = self.tokenizer().get_vocab()
        for encoder in encoders_of(self.settings):
            self._require_vocabulary(encoder, vocabulary)
        return build_private_models(self.settings, Texts(max(vocabulary.values()) + 1), classes, seed, device)

    def _require_vocabulary(self, encoder: PretrainedEncoder, vocabulary: dict[str, int]) -> None:
        """Refuse an encoder that means other tokens by the same numbers."""
        if encoder.has_tokenizer:
            differs = encoder.tokenizer().get_vocab() != vocabulary
        else:
            differs = encoder.config().vocab_size <= max(vocabulary.values())
        if differs:
            raise InputError(
                f"{encoder.described} has another vocabulary than '{self.settings.tokenizer or self.path}', whose "
                "tokenizer encodes the rows of all clients. Name encoders of one vocabulary (minilm has that of "
                "bert-base-uncased), or classes of your own, which any vocabulary suits."
            )
