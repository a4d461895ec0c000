"""The private models of the clients: built by name or by a user's class, and refused where they do not fit together.

A model of your own is a class (or a function) in a file, ``backbone.models=[cnn_1,./mine.py:Net]``. Called with
``(picture, classes)``, the shape ``(channels, height, width)`` of a picture and the number of classes, it gives a
``torch.nn.Module`` with

- ``features(pictures [b, channels, h, w]) -> [b, width]``, of one width for all clients, and
- ``classifier(features [b, width]) -> [b, classes]``.

For texts it is called with ``(vocabulary, classes)``, and ``features`` gets a mapping: ``input_ids [b, t]`` below the
size of the vocabulary, ``attention_mask [b, t]``, and ``token_type_ids [b, t]`` of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapters.personal import SharedPart
from fedlora.config import BackboneConfig, nearest
from fedlora.errors import InputError
from fedlora.personal.cnns import CNN, CNNS
from fedlora.personal.encoders import PACKAGED, PREFIX, SETTING, PretrainedEncoder, is_encoder
from fedlora.personal.inputs import Pictures, Texts
from fedlora.plugins import is_plugin_path, load_object
from fedlora.seeding import derive_seed


@dataclass(frozen=True)
class Outputs:
    """What a client's model says of a batch.

    Attributes:
        features: ``[b, width]``.
        own: logits of its own classifier ``[b, classes]``.
        part: what clients share.
    """

    features: Tensor
    own: Tensor
    part: SharedPart

    @property
    def logits(self) -> Tensor:
        """Its answer ``[b, classes]``: its own, or what the shared part makes of both."""
        return self.part.logits(self.features, self.own)


class PrivateModels(nn.Module):
    """One model of each architecture, of which one runs at a time, and the part that all clients share.

    Attributes:
        models: by name.
        current: the name of the one that runs.
        adapter: the shared part.
        width: of the features.
        classes: of the data.
    """

    def __init__(self, models: dict[str, nn.Module], width: int, classes: int) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)
        self.current = next(iter(models))
        self.adapter = SharedPart()
        self.width, self.classes = width, classes

    def forward(self, pixel_values: Tensor | None = None, **text: Tensor) -> Outputs:
        """Run the current model on pictures ``[b, channels, h, w]`` or texts (``input_ids [b, t]``, ...)."""
        model: Any = self.models[self.current]
        if pixel_values is None and "attention_mask" not in text:
            text["attention_mask"] = torch.ones_like(text["input_ids"])
        features = model.features(text if pixel_values is None else pixel_values)
        return Outputs(features, model.classifier(features), self.adapter)


def names_of(entries: Sequence[str]) -> list[str]:
    """Short names of the entries of ``backbone.models``, in order: what stands in the names of tensors.

    Raises:
        InputError: there is no entry, one is not known, or two have the same name.
    """
    if not entries:
        raise InputError(f"{SETTING} is empty: name one model or more, such as {SETTING}=[{','.join(CNNS)}].")
    names = []
    for entry in entries:
        known = [*CNNS, *PACKAGED]
        if entry.startswith(PREFIX):
            names.append(Path(entry.removeprefix(PREFIX)).name.replace(".", "_"))
            continue
        if entry not in known and not is_plugin_path(entry):
            raise InputError(
                f"{SETTING} names '{entry}', which is not known.{nearest(entry, known)} Known: {', '.join(known)}; or "
                f"give a transformers encoder, such as {PREFIX}./bert-small, or a class of your own, such as "
                "./mine.py:Net."
            )
        names.append(entry.replace(":", ".").rpartition(".")[2])
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"{SETTING} has two models called '{min(twice)}'. Leave one out, or rename its class or folder."
        )
    return names


def encoders_of(settings: BackboneConfig) -> list[PretrainedEncoder]:
    """The pretrained encoders among ``backbone.models``, in order."""
    return [PretrainedEncoder.of(entry, settings) for entry in settings.models if is_encoder(entry)]


def build_private_models(
    settings: BackboneConfig, rows: Pictures | Texts, classes: int, seed: int, device: str
) -> PrivateModels:
    """Build every model of ``backbone.models``; all clients of one architecture start from the same weights.

    Args:
        settings: ``models``, names of known models, encoders or paths of classes; and ``width``, that the features
            must have, ``None``: those of the first model.
        rows: what the models read.
        classes: how many there are.
        seed: of the run; each architecture draws from its own stream.
        device: ``cpu`` or ``meta``.

    Raises:
        InputError: a model cannot be built, has features of another width, or cannot be trained here.
    """
    models: dict[str, nn.Module] = {}
    width = settings.width
    for entry, name in zip(settings.models, names_of(settings.models), strict=True):
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(derive_seed(seed, "private model", name))
            if is_encoder(entry):
                encoder = PretrainedEncoder.of(entry, settings)
                model = encoder.build(rows, classes, settings.width, seed, device)
            else:
                model = _built(entry, rows, classes)
        found = _width(entry, model, rows, classes)
        width = found if width is None else width
        if found != width:
            others = f"backbone.width = {width}" if not models else f"{', '.join(models)} have {width}"
            fix = f"give '{entry}' a last layer of {width} outputs before its classifier, or leave it out"
            raise InputError(
                f"{SETTING}: the features of '{entry}' have {found} numbers and {others}. What clients share works on "
                f"features of one width: {f'set backbone.width={width}' if is_encoder(entry) else fix}."
            )
        models[name] = model.float()
    assert width is not None
    return PrivateModels(models, width, classes)


def _built(entry: str, rows: Pictures | Texts, classes: int) -> nn.Module:
    if entry in CNNS:
        if isinstance(rows, Texts):
            raise InputError(
                f"{SETTING}: '{entry}' reads pictures, and the rows are {rows}: choose task=image_classification and "
                f"data with pictures, such as data=mnist, or models of texts, such as {SETTING}=[minilm]."
            )
        return CNN(CNNS[entry], rows.argument, classes)
    make = load_object(entry, SETTING)
    try:
        model = make(rows.argument, classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{SETTING}: '{entry}' called with ({rows.name}={rows.argument}, classes={classes}) fails: {error}"
        ) from error
    parts = (getattr(model, name, None) for name in ("features", "classifier"))
    if not (isinstance(model, nn.Module) and all(map(callable, parts))):
        raise InputError(
            f"{SETTING}: '{entry}' must give a torch.nn.Module with features({rows.plural}) -> [b, width] and "
            f"classifier(features) -> [b, classes]; it gives a {type(model).__name__} without them."
        )
    if running := [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]:
        raise InputError(
            f"{SETTING}: '{entry}' has running statistics ('{running[0]}'), which are no weights and are not trained "
            "here. Use layers without them, such as GroupNorm instead of BatchNorm."
        )
    return model


def _width(entry: str, model: Any, rows: Pictures | Texts, classes: int) -> int:
    """The width of a model's features, from two empty rows; its classifier must give every class a logit."""
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            features = model.features(rows.example(device))
            logits = model.classifier(features)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{SETTING}: '{entry}' does not read {rows}: {reason}") from error
    if features.ndim != 2 or logits.shape != (2, classes):
        raise InputError(
            f"{SETTING}: '{entry}' gives features {list(features.shape)} and logits {list(logits.shape)} for two "
            f"{rows.plural}; needed are [2, width] and [2, {classes}]."
        )
    return int(features.shape[1])
