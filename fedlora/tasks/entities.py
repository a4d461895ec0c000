"""Entities in sequences of tags: which spans the tags mean, and F1 from integer counts per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Entity = tuple[str, int, int]
BEGINNINGS, ENDS = "BSU", "ELSU"


def has_entities(tags: Sequence[str]) -> bool:
    """Whether a set of tags is a BIO, IOB2 or BIOES scheme rather than one class a word, such as parts of speech."""
    return any(tag.startswith(("B-", "I-")) for tag in tags)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The spans ``(kind, first word, last word + 1)`` that a row's tags mean.

    As conlleval (Tjong Kim Sang and De Meulder 2003): an entity begins at ``B-`` and wherever the kind changes, so an
    ``I-`` without a beginning begins one. ``S-`` and ``U-`` are single words, ``E-`` and ``L-`` last words.
    """
    found: set[Entity] = set()
    kind, start, ended = None, 0, True
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, this = tag.partition("-")
        inside = this if prefix in "BIESLU" and this else None
        if kind is not None and (ended or inside != kind or prefix in BEGINNINGS):
            found.add((kind, start, place))
            kind = None
        if kind is None:
            kind, start = inside, place
        ended = prefix in ENDS
    return found


def entity_counts(predicted: Sequence[str], actual: Sequence[str]) -> tuple[int, int, int]:
    """How many entities of a row are right in kind and span, are predicted, and are there."""
    guesses, truth = entities(predicted), entities(actual)
    return len(guesses & truth), len(guesses), len(truth)


def tag_counts(predicted: np.ndarray, actual: np.ndarray, tags: int) -> np.ndarray:
    """Words of a row that have each tag rightly, have it predicted, and have it ``[3, tags]``, from tag ids."""
    return np.stack([np.bincount(ids, minlength=tags) for ids in (actual[predicted == actual], predicted, actual)])


def scores(right: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 from counts ``[kinds]``: the mean over the kinds that occur; 0.0 where none does."""
    occur = predicted + actual > 0
    if not occur.any():
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    right, predicted, actual = right[occur], predicted[occur], actual[occur]
    return {
        "f1": float((2 * right / (predicted + actual)).mean()),
        "precision": float((right / np.maximum(predicted, 1)).mean()),
        "recall": float((right / np.maximum(actual, 1)).mean()),
    }
