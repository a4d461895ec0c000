"""Pictures as arrays: opened, brought to one size and number of channels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedlora.errors import InputError

MODES = {1: "L", 3: "RGB"}


def pixels(picture: Any, channels: int, size: tuple[int, int], row: int) -> np.ndarray:
    """One picture as ``[channels, h, w]``, uint8.

    Args:
        picture: a path, the bytes of a file, ``{"bytes": ..., "path": ...}`` as hub data sets have it, a PIL image, or
            an array ``[h, w]`` or ``[h, w, 1 | 3 | 4]`` (or nested lists) of whole numbers from 0 to 255.
        channels: 1 (grey) or 3 (RGB).
        size: h and w; a picture of another size is scaled to it (bilinear), whatever its proportions.
        row: number of the row from 0, for messages.

    Raises:
        InputError: the picture cannot be read.
    """
    opened = _read(picture, row, MODES[channels])
    if opened.size != (size[1], size[0]):
        opened = opened.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    values = np.asarray(opened, dtype=np.uint8)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def shape_of(picture: Any, row: int) -> tuple[int, int, int]:
    """Channels (1 for grey, 3 for any colour), height and width of a picture; see :func:`pixels`."""
    opened = _read(picture, row)
    return (1 if len(opened.getbands()) == 1 and opened.mode != "P" else 3, opened.height, opened.width)


def _read(picture: Any, row: int, mode: str | None = None) -> Image.Image:
    """A picture, converted to ``mode``.

    Raises:
        InputError: it cannot be read.
    """
    try:
        opened = _opened(picture)
        opened.load()  # and close its file
        return opened if mode is None else opened.convert(mode)
    except (OSError, ValueError, TypeError, KeyError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"Row {row + 1}: the picture {_described(picture)} (data.image) cannot be read: {reason}. Rows count from "
            "1. Mend or remove it; pictures are paths, files' bytes, or uint8 arrays [h, w] or [h, w, 3]."
        ) from error


def _opened(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, Mapping):
        content = picture.get("bytes")
        picture = picture["path"] if content is None else content
    if isinstance(picture, bytes):
        return Image.open(io.BytesIO(picture))
    if isinstance(picture, str):
        return Image.open(picture)
    return Image.fromarray(_array(picture))


def _array(picture: Any) -> np.ndarray:
    """An array, or nested lists or arrays of arrays, as uint8 ``[h, w]`` or ``[h, w, c]``."""
    while isinstance(picture, np.ndarray) and picture.dtype == object:
        picture = [part.tolist() if isinstance(part, np.ndarray) else part for part in picture]
        picture = np.array(picture)
    values = np.asarray(picture)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (3, 4)):
        raise ValueError(f"an array of shape {list(values.shape)} is no picture")
    if values.dtype.kind not in "ui" or values.min() < 0 or values.max() > 255:
        raise ValueError(f"its values are {values.dtype}, not whole numbers from 0 to 255")
    return np.ascontiguousarray(values, dtype=np.uint8)


def _described(picture: Any) -> str:
    if isinstance(picture, Mapping):
        picture = picture.get("path")
    return repr(picture) if isinstance(picture, str) else f"of type {type(picture).__name__}"
