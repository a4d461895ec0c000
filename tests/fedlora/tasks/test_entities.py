from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from fedlora.tasks.entities import entities, entity_counts, has_entities, scores, tag_counts

TAGS = st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), max_size=12)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", set()),
        ("O O", set()),
        ("B-X I-X O", {("X", 0, 2)}),
        ("O B-X", {("X", 1, 2)}),
        ("B-X B-X I-X", {("X", 0, 1), ("X", 1, 3)}),
        ("B-X I-Y", {("X", 0, 1), ("Y", 1, 2)}),  # the kind changes
        ("O I-X I-X O", {("X", 1, 3)}),  # an entity without a beginning
        ("I-X B-X", {("X", 0, 1), ("X", 1, 2)}),
        ("S-X S-X B-Y I-Y E-Y I-Y", {("X", 0, 1), ("X", 1, 2), ("Y", 2, 5), ("Y", 5, 6)}),  # BIOES
        ("U-X B-Y L-Y", {("X", 0, 1), ("Y", 1, 3)}),  # BILOU
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
    ],
)
def test_tags_mean_spans_as_conlleval_reads_them(tags: str, expected: set):
    assert entities(tags.split()) == expected


@given(TAGS)
def test_spans_cover_every_tagged_word_once(tags: list[str]):
    covered = sorted(place for _, start, end in entities(tags) for place in range(start, end))
    assert covered == [place for place, tag in enumerate(tags) if tag != "O"]
    beginnings = sum(tag.startswith("B-") for tag in tags)
    assert len(entities(tags)) >= beginnings


def test_an_entity_is_right_in_kind_and_span_only():
    actual = ["B-X", "I-X", "O", "B-Y", "O", "B-X"]
    predicted = ["B-X", "O", "O", "B-X", "O", "B-X"]  # too short, wrong kind, right
    assert entity_counts(predicted, actual) == (1, 3, 3)


def test_a_scheme_of_entities_is_known_by_its_prefixes():
    assert has_entities(["O", "B-PER"])
    assert not has_entities(["NOUN", "VERB", "O", "B"])


def test_scores_over_tags_are_sklearns_macro_averages():
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 4, 9), rng.integers(0, 3, 9)) for _ in range(5)]  # tag 4 never occurs
    found = scores(*sum(tag_counts(predicted, actual, 5) for predicted, actual in rows))
    predicted, actual = (np.concatenate(side) for side in zip(*rows, strict=True))
    precision, recall, f1, _ = precision_recall_fscore_support(actual, predicted, average="macro", zero_division=0)
    assert found == pytest.approx({"f1": f1, "precision": precision, "recall": recall})


def test_scores_of_entities_are_over_all_of_them_together():
    counts = np.array([[3], [4], [6]])
    assert scores(*counts) == pytest.approx({"f1": 0.6, "precision": 0.75, "recall": 0.5})


def test_rows_without_entities_score_zero():
    assert scores(*np.zeros((3, 1), int)) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
