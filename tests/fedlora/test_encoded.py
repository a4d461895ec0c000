from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.encoded import EncodedRows, cache_folder, cached

LISTS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=6)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tokens(pairs: bool = False) -> EncodedRows:
    ragged = {"input_ids": [[1, 2, 3], [], [4]]}
    if pairs:
        ragged["token_type_ids"] = [[0, 1, 1], [], [0]]
    return EncodedRows.from_lists(ragged, {"target": [1, 0, 1]}, truncated=2)


def numbers() -> EncodedRows:
    return EncodedRows.from_lists({"input_ids": [[1], [2, 3]]}, {"target": np.array([0.5, -1.25])})


def pictures() -> EncodedRows:
    return EncodedRows.from_arrays(pixels=np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3), target=[1, 0])


def arrays_of(rows: EncodedRows) -> dict[str, np.ndarray]:
    return {"offsets": rows.offsets, **rows.ragged, **{f"fixed {name}": values for name, values in rows.fixed.items()}}


def assert_equal(one: EncodedRows, other: EncodedRows) -> None:
    mine, theirs = arrays_of(one), arrays_of(other)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        np.testing.assert_array_equal(values, theirs[name])
        assert values.dtype == theirs[name].dtype
    assert one.truncated == other.truncated


@given(LISTS)
def test_every_row_is_found_again(lists):
    rows = EncodedRows.from_lists({"input_ids": lists, "labels": lists}, {"target": [0] * len(lists)})
    assert len(rows) == len(lists)
    for name in ("input_ids", "labels"):
        assert [rows.piece(name, i).tolist() for i in range(len(lists))] == lists
        assert rows.ragged[name].dtype == np.int32
    np.testing.assert_array_equal(rows.lengths(np.arange(len(lists))), [len(row) for row in lists])
    assert rows.offsets.dtype == np.int64


def test_labels_may_be_negative():
    assert EncodedRows.from_lists({"labels": [[-100, 3]]}, {}).piece("labels", 0).tolist() == [-100, 3]


def test_rows_without_a_length_count_as_one_token_each():
    assert len(pictures()) == 2
    assert pictures().lengths(np.array([1, 0])).tolist() == [1, 1]


@pytest.mark.parametrize("expected", [tokens(), tokens(pairs=True), numbers(), pictures()])
def test_cached_rows_are_made_once_and_read_as_they_were(cache: Path, expected: EncodedRows):
    calls = []

    def make() -> EncodedRows:
        calls.append(1)
        return expected

    for _ in range(3):
        assert_equal(cached(["a", b"b"], make), expected)
    assert len(calls) == 1
    assert [path.suffix for path in (cache / "rows").iterdir()] == [".npz"]


def test_another_key_is_another_entry(cache: Path):
    keys = [["ab"], ["a", "b"], ["a", "c"], [b"ab", "x"]]
    for number, key in enumerate(keys):
        cached(key, lambda number=number: EncodedRows.from_lists({"input_ids": [[number]]}, {}))
    for number, key in enumerate(keys):
        assert cached(key, tokens).ragged["input_ids"].tolist() == [number]


def test_a_failed_encoding_leaves_nothing_behind(cache: Path):
    def fail() -> EncodedRows:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached(["k"], fail)
    assert_equal(cached(["k"], tokens), tokens())


def test_the_cache_lies_where_the_environment_says(cache: Path, monkeypatch: pytest.MonkeyPatch):
    assert cache_folder() == cache
    monkeypatch.delenv("FEDLORA_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "fedlora"
