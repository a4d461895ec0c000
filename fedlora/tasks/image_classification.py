"""Classification of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification
from transformers.image_processing_base import ImageProcessingMixin

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.tasks.base import Batch, Schema, collate, plain_text, register
from fedlora.tasks.classification import Classification, ClassificationConfig
from fedlora.tasks.labels import (
    class_numbers,
    label_names,
)
from fedlora.tasks.pictures import pixels, shape_of


class ImageClassificationConfig(ClassificationConfig):
    """Image classification's settings.

    Attributes:
        calibration: also report the expected calibration error ``ece`` of the predicted probabilities.
        image_size: height and width that pictures are scaled to, for models that read any size (such as ResNet);
            ``None``: the model's own.
    """

    image_size: int | tuple[int, int] | None = None


@register
class ImageClassification(Classification):
    """Predict the class of a picture ``data.image``; see :func:`fedlora.tasks.pictures.pixels` for what it may be."""

    Config = ImageClassificationConfig
    name = "image_classification"
    auto_class = AutoModelForImageClassification
    head_modules = ("classifier",)
    columns = ("image", "label")
    nested = ("image",)

    def schema(self, rows: pd.DataFrame) -> Schema:
        """The labels; for models that are built for the data also the shape of its first picture."""
        return self._with_picture(super().schema(rows), rows)

    def agreed(self, rows: pd.DataFrame, labels: tuple[str, ...]) -> Schema:
        """``labels``, and what :meth:`schema` says of pictures."""
        return self._with_picture(super().agreed(rows, labels), rows)

    def _with_picture(self, schema: Schema, rows: pd.DataFrame) -> Schema:
        if not self.backbone.any_picture:
            return schema
        channels, *size = shape_of(rows["image"].iloc[0], 0)
        height, width = _sides(cast(ImageClassificationConfig, self.config).image_size or (size[0], size[1]))
        return replace(schema, picture=(channels, height, width))

    def encode(self, rows: pd.DataFrame, schema: Schema, max_length: int) -> EncodedRows:
        """``pixels [rows, channels, h, w]`` (uint8) in the model's size, and ``target [rows]``.

        Raises:
            InputError: a picture cannot be read.
        """
        channels, *size = schema.picture or (self._channels, *self._size)
        size = size[0], size[1]
        values = np.empty((len(rows), channels, *size), dtype=np.uint8)
        for row, picture in enumerate(rows["image"]):
            values[row] = pixels(picture, channels, size, row)
        return EncodedRows.from_arrays(pixels=values, target=class_numbers(plain_text(rows, "label"), schema))

    def collate(self, rows: EncodedRows, numbers: Sequence[int] | np.ndarray) -> Batch:
        """``pixel_values [b, channels, h, w]`` (fp32, by the checkpoint's mean and deviation) and ``target [b]``."""
        batch = collate(rows, numbers, 0)
        mean, deviation = self._normalisation
        return {"pixel_values": (batch["pixels"].float() / 255 - mean) / deviation, "target": batch["target"]}

    def model_overrides(self, schema: Schema) -> dict[str, Any]:
        """The labels by name, for the exported model; the shape of pictures where the models are built for them."""
        return label_names(schema) | ({} if schema.picture is None else {"picture": schema.picture})

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits ``[b, classes]`` in fp32.

        Raises:
            InputError: the model reads no pictures of this size.
        """
        try:
            return model(pixel_values=batch["pixel_values"]).logits.float()
        except ValueError as error:
            if "image size" not in str(error):
                raise
            reason = str(error).rstrip(".")
            raise InputError(f"task.image_size: {reason}. Set task.image_size=null for its own.") from error

    @cached_property
    def _timm(self) -> dict[str, Any]:
        """What a timm model says of its pictures: ``input_size`` (channels, h, w), ``mean`` and ``std``."""
        return getattr(self.backbone.config(), "pretrained_cfg", None) or {}

    @cached_property
    def _preprocessor(self) -> dict[str, Any]:
        """The checkpoint's ``preprocessor_config.json``; empty where it has none."""
        if self.backbone.path is None:
            return {}
        try:
            return ImageProcessingMixin.get_image_processor_dict(self.backbone.path)[0]
        except OSError:
            return {}

    @property
    def _channels(self) -> int:
        return int(getattr(self.backbone.config(), "num_channels", self._timm.get("input_size", [3])[0]))

    @property
    def _size(self) -> tuple[int, int]:
        given = cast(ImageClassificationConfig, self.config).image_size
        size: Any = given or getattr(self.backbone.config(), "image_size", None) or self._timm.get("input_size", [])[1:]
        size = size or self._preprocessor.get("size") or 224
        if isinstance(size, dict):
            size = size.get("shortest_edge") or (size["height"], size["width"])
        return _sides(size)

    @cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel ``[channels or 1, 1, 1]``, of values from 0 to 1."""
        if self.backbone.any_picture:
            return torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.5)
        known = {"image_mean": self._timm.get("mean"), "image_std": self._timm.get("std")}
        known = {name: value for name, value in known.items() if value} | self._preprocessor
        if known.get("do_normalize") is False:
            return torch.zeros(self._channels, 1, 1), torch.ones(self._channels, 1, 1)
        chosen = []
        for name in ("image_mean", "image_std"):
            values = np.atleast_1d(known.get(name) or 0.5)
            fit = values if len(values) in (1, self._channels) else values.mean(keepdims=True)
            chosen.append(torch.tensor(fit, dtype=torch.float32).expand(self._channels)[:, None, None])
        return chosen[0], chosen[1]


def _sides(size: Any) -> tuple[int, int]:
    """Height and width, from both or from one number."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
