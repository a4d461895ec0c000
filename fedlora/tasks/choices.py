"""The choices of multiple-choice rows, and which of them a label calls right, in the forms that data sets use."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fedlora.errors import InputError


def resolve(rows: pd.DataFrame) -> list[tuple[list[str], int]]:
    """The choices of every row and the number of the right one, from 0.

    Raises:
        InputError: a row has fewer than two choices, or its label is none of them.
    """
    found, styles = [], set()
    for row, (value, label) in enumerate(zip(rows["choices"], rows["label"], strict=True)):
        choices, keys = choices_of(value)
        if len(choices) < 2 or not all(choice.strip() for choice in choices):
            raise InputError(
                f"Row {row + 1}: data.choices must hold at least two texts, and holds {choices} (rows count from 1)."
            )
        style, right = right_choice(label, choices, keys)
        if right is None:
            raise InputError(
                f"Row {row + 1}: data.label = {label!r} is none of its {len(choices)} choices (data.choices). Give "
                "the number of the right one counted from 0, its letter (A, B, ...), or its text."
            )
        styles.add(style)
        found.append((choices, right))
    if {"letter", "number"} <= styles:
        raise InputError(
            "data.label has letters in some rows and numbers in others, so it is not clear from where the numbers "
            "count. Write all labels as letters, or all as numbers from 0."
        )
    return found


def choices_of(value: Any) -> tuple[list[str], list[str]]:
    """The texts of a row's choices and the keys that labels call them by, where the data has such.

    ``value`` is a list or array of texts, or ``{"text": [...], "label": [...]}`` as ARC and CommonsenseQA have it.
    """
    if isinstance(value, Mapping):
        keys = [str(key) for key in value.get("label", [])]
        return [str(text) for text in value.get("text", [])], keys
    return [str(text) for text in (value if np.ndim(value) else [])], []


def right_choice(label: Any, choices: list[str], keys: list[str]) -> tuple[str, int | None]:
    """How a label says which choice is right (``text``, ``letter`` or ``number``), and which; ``None`` if it does not.

    It is one of the row's own keys, the text of a choice, its letter, or its number counted from 0, in this order.
    """
    word = str(int(label) if isinstance(label, float | np.floating) and label == int(label) else label).strip()
    if word in keys:
        return "text", keys.index(word)
    texts = [choice.strip() for choice in choices]
    if isinstance(label, str) and texts.count(word) == 1:
        return "text", texts.index(word)
    style = "number" if word.isdecimal() else "letter"
    letter = string.ascii_uppercase.find(word.upper()) if len(word) == 1 else -1
    number = int(word) if style == "number" else letter
    return style, number if 0 <= number < len(choices) else None
