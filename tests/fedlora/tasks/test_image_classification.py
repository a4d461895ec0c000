from __future__ import annotations

import gc
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from fedlora.backbone import Backbone
from fedlora.config import BackboneConfig
from fedlora.errors import InputError
from fedlora.tasks import Schema, Task, build_task
from fedlora.tasks.pictures import shape_of
from tests.fedlora.tasks.helpers import model_of, task_on, task_on_random

VIT = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
LABELS = Schema(("cat", "dog"))
RNG = np.random.default_rng(0)
COLOUR, GREY = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8), RNG.integers(0, 256, (8, 8), dtype=np.uint8)


def task(channels: int = 3, **settings: object) -> Task:
    return task_on_random("vit", {**VIT, "num_channels": channels}, "image_classification", **settings)


def frame(*pictures: object) -> pd.DataFrame:
    labels = [LABELS.labels[i % 2] for i in range(len(pictures))]
    return pd.DataFrame({"image": pd.Series(list(pictures), dtype=object), "label": labels})


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def encoded(work: Task, *pictures: object) -> np.ndarray:
    return work.encode(frame(*pictures), LABELS, 48).fixed["pixels"]


def test_a_picture_is_the_same_however_it_comes(tmp_path: Path):
    path = tmp_path / "cat.png"
    path.write_bytes(png(COLOUR))
    nested = np.array([np.array(list(row), dtype=object) for row in COLOUR], dtype=object)
    forms = [
        COLOUR, COLOUR.astype(np.int64), COLOUR.tolist(), nested, Image.fromarray(COLOUR), str(path), png(COLOUR),
        {"bytes": png(COLOUR), "path": None}, {"bytes": None, "path": str(path)},
    ]  # fmt: skip
    pixels = encoded(task(), *forms)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (len(forms), 3, 8, 8)
    for values in pixels:
        np.testing.assert_array_equal(values, COLOUR.transpose(2, 0, 1))


def test_pictures_get_the_channels_of_the_model():
    np.testing.assert_array_equal(encoded(task(3), GREY), np.broadcast_to(GREY, (1, 3, 8, 8)))
    np.testing.assert_array_equal(encoded(task(1), GREY, GREY[..., None])[1, 0], GREY)
    grey = np.asarray(Image.fromarray(COLOUR).convert("L"))
    np.testing.assert_array_equal(encoded(task(1), COLOUR)[0, 0], grey)
    transparent = np.concatenate([COLOUR, np.full((8, 8, 1), 7, np.uint8)], axis=2)
    np.testing.assert_array_equal(encoded(task(3), transparent), encoded(task(3), COLOUR))


def test_pictures_are_scaled_to_the_model():
    plain = np.full((5, 13, 3), 200, np.uint8)
    assert (encoded(task(), plain) == 200).all()
    wide = task_on_random("vit", {**VIT, "image_size": [8, 12]}, "image_classification")
    assert encoded(wide, plain).shape == (1, 3, 8, 12)


@pytest.mark.parametrize(("size", "shape"), [(16, (16, 16)), ([8, 4], (8, 4)), (None, (224, 224))])
def test_models_of_any_size_take_the_size_that_is_set(size: object, shape: tuple):
    work = task_on_random("resnet", {}, "image_classification", image_size=size)
    assert encoded(work, COLOUR).shape == (1, 3, *shape)


def test_a_size_that_the_model_does_not_read_is_refused():
    work = task_on_random("vit", VIT, "image_classification", image_size=16)
    batch = work.collate(work.encode(frame(COLOUR), LABELS, 48), [0])
    model = work.backbone.load(work.auto_class, 1, num_labels=2)
    with pytest.raises(InputError, match=r"task\.image_size: .*16.*doesn't match model.*task\.image_size=null"):
        work.loss(model, batch)


@pytest.mark.parametrize(
    "bad",
    [
        "nowhere.png", b"no picture", None, 7, np.zeros((8,), np.uint8), np.zeros((3, 8, 8), np.uint8),
        np.full((8, 8), 0.5), np.full((8, 8), 256), np.full((8, 8), -1), {"path": None, "bytes": None}, {"other": 1},
    ],
)  # fmt: skip
def test_an_unreadable_picture_is_refused_with_its_row(bad: object):
    with pytest.raises(InputError, match=r"Row 2: the picture .*\(data\.image\) cannot be read"):
        encoded(task(), COLOUR, bad)


@pytest.mark.parametrize(
    ("first", "size", "shape"),
    [(COLOUR, None, (3, 8, 8)), (GREY, None, (1, 8, 8)), (COLOUR[:5], None, (3, 5, 8)), (GREY, [6, 4], (1, 6, 4))],
)
def test_private_models_get_the_pictures_of_the_data(first: np.ndarray, size: object, shape: tuple):
    backbone = Backbone.from_config(BackboneConfig(name="heterogeneous", models=["cnn_5"]))
    work = build_task({"name": "image_classification", "image_size": size}, backbone)
    rows = frame(first, COLOUR)
    schema = work.schema(rows)
    assert schema == Schema(("cat", "dog"), shape)
    assert work.model_overrides(schema)["picture"] == shape
    pixels = work.encode(rows, schema, 48)
    assert pixels.fixed["pixels"].shape == (2, *shape)
    values = work.collate(pixels, [0, 1])["pixel_values"]
    assert values.shape == (2, *shape)
    torch.testing.assert_close(values, torch.from_numpy(pixels.fixed["pixels"]) / 127.5 - 1, atol=1e-6, rtol=0)


def test_a_palette_is_colour():
    picture = Image.fromarray(COLOUR).convert("P")
    assert shape_of(picture, 0) == (3, 8, 8)
    with pytest.raises(InputError, match=r"Row 4: the picture 'none\.png'"):
        shape_of("none.png", 3)


def test_the_file_of_a_picture_does_not_stay_open(tmp_path: Path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert shape_of(str(path), 0) == (1, 4, 6)
        gc.collect()
    assert [str(each.message) for each in warned] == []


def test_an_unreadable_file_is_refused_with_its_path(tmp_path: Path):
    path = tmp_path / "dog.png"
    path.write_text("no picture")
    for form in (str(path), {"bytes": None, "path": str(path)}):
        with pytest.raises(InputError, match=r"dog\.png"):
            encoded(task(), form)


def test_values_are_from_minus_one_to_one_without_a_preprocessor():
    work = task()
    batch = work.collate(work.encode(frame(COLOUR, np.zeros_like(COLOUR)), LABELS, 48), [1, 0])
    assert set(batch) == {"pixel_values", "target"}
    assert batch["target"].tolist() == [1, 0]
    assert (batch["pixel_values"][0] == -1).all()
    torch.testing.assert_close(batch["pixel_values"][1], torch.tensor(COLOUR).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("normalised", [True, False])
def test_values_follow_the_checkpoints_preprocessor(tmp_path: Path, normalised: bool):
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path)
    mean, deviation = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": deviation}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": normalised}))
    work = task_on(tmp_path, "image_classification")
    batch = work.collate(work.encode(frame(COLOUR), LABELS, 48), [0])
    shift, scale = (mean, deviation) if normalised else ([0.0] * 3, [1.0] * 3)
    expected = (torch.tensor(COLOUR) / 255 - torch.tensor(shift)) / torch.tensor(scale)
    torch.testing.assert_close(batch["pixel_values"][0], expected.permute(2, 0, 1))
    model = work.backbone.load(work.auto_class, 0, **work.model_overrides(LABELS))
    assert model(pixel_values=batch["pixel_values"]).logits.shape == (1, 2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return model_of(task(), LABELS)


def test_the_loss_is_transformers_own_and_statistics_are_of_every_row(model: nn.Module):
    work = task()
    pictures = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    batch = work.collate(work.encode(frame(*pictures), LABELS, 48), range(6))
    expected = model(pixel_values=batch["pixel_values"], labels=batch["target"])
    torch.testing.assert_close(work.loss(model, batch), expected.loss)
    found = work.statistics(model, batch)
    losses = functional.cross_entropy(expected.logits, batch["target"], reduction="none")
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-6)
    np.testing.assert_array_equal(found["predicted"], expected.logits.argmax(1))
    assert set(work.metrics(found)) == {"accuracy", "macro_f1", "mcc", "f1", "loss"}
    assert "ece" in task(calibration=True).metrics(found)
    assert work.weight(batch) == 6


def test_zero_shot_answers_the_majority_class():
    work = task()
    rows = work.encode(frame(COLOUR, COLOUR, COLOUR), LABELS, 48)
    found = work.zero_shot(rows, np.array([0, 2, 1]), np.array([1, 0]))
    assert found is not None
    assert found["predicted"].tolist() == [0, 0]


def test_a_model_of_timm_reads_pictures_of_its_own_size():
    pytest.importorskip("timm")
    cfg = {"input_size": [3, 16, 16], "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    work = task_on_random("timm_wrapper", {"architecture": "resnet10t", "pretrained_cfg": cfg}, "image_classification")
    batch = work.collate(work.encode(frame(COLOUR, COLOUR), LABELS, 48), [0, 1])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert float(batch["pixel_values"].min()) >= 0
    model = work.backbone.load(work.auto_class, 0, **work.model_overrides(LABELS))
    assert work.statistics(model, batch)["predicted"].shape == (2,)
