from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.tokens import TokenisedRows, cache_folder, cached

LISTS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=6)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def some_rows(segments: list[int] | None = None) -> TokenisedRows:
    return TokenisedRows.from_lists([[1, 2, 3], [], [4]], [1, 0, 1], segments, truncated=2)


def assert_equal(one: TokenisedRows, other: TokenisedRows) -> None:
    for field in ("flat", "offsets", "targets", "segments"):
        a, b = getattr(one, field), getattr(other, field)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    assert one.truncated == other.truncated


@given(LISTS)
def test_every_row_is_found_again(lists):
    rows = TokenisedRows.from_lists(lists, [0] * len(lists))
    assert [rows.ids(i).tolist() for i in range(len(lists))] == lists
    np.testing.assert_array_equal(rows.lengths(np.arange(len(lists))), [len(row) for row in lists])
    assert rows.flat.dtype == np.int32
    assert rows.offsets.dtype == rows.targets.dtype == np.int64


@pytest.mark.parametrize("segments", [None, [1, 0, 1]])
def test_cached_rows_are_made_once_and_read_as_they_were(cache: Path, segments: list[int] | None):
    calls = []

    def make() -> TokenisedRows:
        calls.append(1)
        return some_rows(segments)

    for _ in range(3):
        assert_equal(cached(["a", b"b"], make), some_rows(segments))
    assert len(calls) == 1
    assert [path.suffix for path in (cache / "tokens").iterdir()] == [".npz"]


def test_another_key_is_another_entry(cache: Path):
    keys = [["ab"], ["a", "b"], ["a", "c"], [b"ab", "x"]]
    for number, key in enumerate(keys):
        cached(key, lambda number=number: TokenisedRows.from_lists([[number]], [0]))
    for number, key in enumerate(keys):
        assert cached(key, some_rows).flat.tolist() == [number]


def test_a_failed_encoding_leaves_nothing_behind(cache: Path):
    def fail() -> TokenisedRows:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached(["k"], fail)
    assert_equal(cached(["k"], some_rows), some_rows())


def test_the_cache_lies_where_the_environment_says(cache: Path, monkeypatch: pytest.MonkeyPatch):
    assert cache_folder() == cache
    monkeypatch.delenv("FEDLORA_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "fedlora"
