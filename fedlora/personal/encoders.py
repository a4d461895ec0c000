"""Pretrained transformers encoders as private models: ``minilm``, or ``hf:<folder or hub id>`` of texts or pictures.

The mean of an encoder's last hidden states, padding left out, goes through one linear layer to the width of features
that all clients have, and a linear classifier reads these. Everything is trained.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoModel

from fedlora.backbone import Backbone
from fedlora.config import BackboneConfig
from fedlora.errors import InputError
from fedlora.packaged import minilm_folder
from fedlora.personal.inputs import Inputs, Pictures, Texts
from fedlora.seeding import derive_seed

PREFIX = "hf:"
PACKAGED = ("minilm",)
SETTING = "backbone.models"


def is_encoder(entry: str) -> bool:
    """Whether an entry of ``backbone.models`` names a pretrained encoder."""
    return entry in PACKAGED or entry.startswith(PREFIX)


@dataclass(frozen=True)
class PretrainedEncoder(Backbone):
    """The weights, configuration and tokenizer of one entry."""

    entry: str

    @classmethod
    def of(cls, entry: str, settings: BackboneConfig) -> PretrainedEncoder:
        """The encoder ``entry`` with the attention and checkpointing that ``settings`` ask for."""
        path = str(minilm_folder()) if entry in PACKAGED else entry.removeprefix(PREFIX)
        own = settings.model_copy(update={"name": "hf", "path": path, "tokenizer": None, "models": [], "width": None})
        return cls(own, path, entry)

    @property
    def described(self) -> str:
        """How messages call it."""
        return f"{SETTING}: '{self.entry}'"

    def build(self, rows: Pictures | Texts, classes: int, width: int | None, seed: int, device: str) -> EncoderModel:
        """The encoder with its weights, and with layers drawn from the global generator behind it.

        Raises:
            InputError: it is no encoder of such rows, or does not load.
        """
        config = self.config()
        pictures = isinstance(rows, Pictures)
        known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if pictures else MODEL_FOR_MASKED_LM_MAPPING
        decodes = any(getattr(config, name, False) for name in ("is_decoder", "is_encoder_decoder"))
        if type(config) not in known or decodes:
            kind, example = ("pictures", "a ViT") if pictures else ("texts", "minilm or a BERT")
            raise InputError(
                f"{self.described} is of type '{config.model_type}', which is no encoder of {kind}: the features of a "
                f"row are the mean over hidden states that see all of it. Name one of the kind of {example}, or leave "
                "it out."
            )
        if device == "meta":
            encoder = self.meta(AutoModel)
        else:
            loaded = self.load(AutoModel, derive_seed(seed, "encoder", self.entry), quantized=False)
            encoder = copy.deepcopy(loaded)  # the weights of what was loaded are for everybody, and these are trained
        size = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        return EncoderModel(encoder, int(size), size if width is None else width, classes)


class EncoderModel(nn.Module):
    """An encoder, the mean of its hidden states, a projection to the features, and a classifier."""

    def __init__(self, encoder: nn.Module, size: int, width: int, classes: int) -> None:
        """Stand behind ``encoder``, whose hidden states have ``size`` numbers."""
        super().__init__()
        self.encoder: Any = encoder.requires_grad_(True)
        pooler = getattr(encoder, "pooler", None)
        if pooler is not None and list(pooler.parameters()):
            self.encoder.pooler = None  # it would be held, and never trained
        self.reads = frozenset(inspect.signature(encoder.forward).parameters)
        self.project = nn.Linear(size, width)
        self.classifier = nn.Linear(width, classes)

    def features(self, inputs: Inputs) -> Tensor:
        """``[b, width]`` of pictures or texts."""
        if isinstance(inputs, Tensor):
            hidden = self.encoder(pixel_values=inputs).last_hidden_state  # [b, t, size] or [b, size, h, w]
            pooled = hidden.mean(1) if hidden.ndim == 3 else hidden.flatten(2).mean(2)
        else:
            skipped = {"attention_mask"} if inputs["input_ids"].is_meta else set()  # transformers looks into it
            read = {name: value for name, value in inputs.items() if name in self.reads - skipped}
            hidden = self.encoder(**read).last_hidden_state
            real = inputs["attention_mask"][..., None].to(hidden.dtype)
            pooled = (hidden * real).sum(1) / real.sum(1)
        return self.project(pooled)
