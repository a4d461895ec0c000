"""Which rows each client trains, validates and tests on, and which rows no training client ever sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedlora.config import PartitionConfig, SplitConfig
from fedlora.errors import InputError
from fedlora.seeding import numpy_rng

if TYPE_CHECKING:
    from fedlora.tasks import Schema

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ClientIndex:
    """Row numbers by use. No row is in two of these sets; each array is ascending, shape ``[rows of the set]``.

    Attributes:
        train: rows each training client trains on, by client id in sorted order; never empty.
        validation: rows each training client validates on, same keys; empty for a client with too few rows.
        test: rows each training client is tested on, same keys; empty for a client with too few rows.
        unseen: all rows of the clients that never train, by client id in sorted order: the global test set.
        public: the server's own rows, from clients that are in no other set.
        left_out_clients: clients in no set, because they have fewer than ``partition.min_rows`` rows.
        left_out_rows: the rows of those clients.
    """

    train: Mapping[str, Rows]
    validation: Mapping[str, Rows]
    test: Mapping[str, Rows]
    unseen: Mapping[str, Rows]
    public: Rows
    left_out_clients: int
    left_out_rows: int

    @cached_property
    def clients(self) -> tuple[str, ...]:
        """The training clients' ids, sorted."""
        return tuple(self.train)


def build_index(
    client_of_row: NDArray[np.object_], split: SplitConfig, partition: PartitionConfig, seed: int
) -> ClientIndex:
    """Divide the clients into training, unseen and public ones, and the rows of each training client in three.

    The rows of a client are divided by a stream of its own, so the division does not depend on the other clients. A
    training client keeps at least one training row; with three rows or more it also has a validation row and a test
    row, where those fractions are above 0.

    Args:
        client_of_row: the client id of every row, shape ``[rows]``.
        split: the fractions and the number of public rows. Of the last public client only some rows may be used;
            its others are in no set.
        partition: ``min_rows`` is the fewest rows a client takes part with.
        seed: the seed of the run.

    Raises:
        InputError: no client is left to train, or there are too few clients for the public rows.
    """
    rows_of, left_out = _rows_of_clients(client_of_row, partition.min_rows)
    clients = list(rows_of)
    drawn = [clients[place] for place in numpy_rng(seed, "unseen").permutation(len(clients))]
    unseen_count = max(1, round(split.unseen_clients * len(clients))) if split.unseen_clients else 0
    shuffled = {client: _shuffled(rows_of[client], client, seed) for client in drawn[unseen_count:]}
    public_clients, public = _public_rows(shuffled, split.public_rows)
    training = sorted(set(shuffled) - set(public_clients))
    if not training:
        raise InputError(
            f"No client is left to train: {len(clients)} clients have partition.min_rows = {partition.min_rows} rows "
            f"or more ({len(left_out)} have fewer), {min(unseen_count, len(clients))} are held out by "
            f"data.split.unseen_clients = {split.unseen_clients} and {len(public_clients)} by data.split.public_rows = "
            f"{split.public_rows}. Lower one of these settings or bring more clients."
        )
    parts = {client: _split(shuffled[client], split) for client in training}
    return ClientIndex(
        train={client: train for client, (train, _, _) in parts.items()},
        validation={client: validation for client, (_, validation, _) in parts.items()},
        test={client: test for client, (_, _, test) in parts.items()},
        unseen={client: rows_of[client] for client in sorted(drawn[:unseen_count])},
        public=public,
        left_out_clients=len(left_out),
        left_out_rows=sum(len(rows) for rows in left_out),
    )


def groups_of_clients(rows: pd.DataFrame, index: ClientIndex) -> dict[str, str]:
    """The group of every training client, from the column ``group``; empty where the data has none.

    Raises:
        InputError: a client has rows of several groups.
    """
    if "group" not in rows:
        return {}
    groups = {}
    for client in index.clients:
        own = np.concatenate([index.train[client], index.validation[client], index.test[client]])
        found = pd.unique(rows["group"].iloc[own])
        if len(found) == 0:  # rows that are elsewhere
            continue
        if len(found) > 1:
            raise InputError(
                f"data.group: client '{client}' has rows of {len(found)} groups, among them '{found[0]}' and "
                f"'{found[1]}', and a client belongs to one. Name a column that is the same in all rows of a client "
                "(with partition=natural), or set data.group=null."
            )
        groups[client] = str(found[0])
    return groups


def untrained_labels(rows: pd.DataFrame, index: ClientIndex, schema: Schema) -> list[str]:
    """The labels of ``schema`` that no training row has, in its order: a model cannot learn them.

    Args:
        rows: the table ``[rows]`` with the column ``label`` (of values, or as for tagged words of lists of them or of
            texts that separate them by spaces). Where it has none of the schema's names, such as numbers that the
            task gives names to, nothing can be said.
        index: which rows are trained on.
        schema: what the clients agree on; without labels the answer is empty.
    """
    trained_rows = np.concatenate(list(index.train.values()))
    if not schema.labels or "label" not in rows or len(trained_rows) == 0:
        return []
    trained = rows["label"].iloc[trained_rows]
    seen = set(_texts(trained.tolist()))
    seen |= {word for text in seen.difference(schema.labels) for word in text.split()}
    return [label for label in schema.labels if label not in seen] if seen.intersection(schema.labels) else []


def _texts(values: Iterable[Any]) -> Iterable[str]:
    """Every value as text, those inside lists one by one."""
    for value in values:
        if isinstance(value, str) or not isinstance(value, Iterable):
            yield str(value)
        else:
            yield from _texts(value)


def _rows_of_clients(client_of_row: NDArray[np.object_], min_rows: int) -> tuple[dict[str, Rows], list[Rows]]:
    """Return the rows of every client in sorted order, and those of the clients that are too small."""
    code_of_row, names = pd.factorize(client_of_row, sort=True)
    ends = np.cumsum(np.bincount(code_of_row, minlength=len(names)))
    groups = np.split(np.argsort(code_of_row, kind="stable"), ends[:-1])
    rows_of = {str(name): rows for name, rows in zip(names, groups, strict=True) if len(rows) >= min_rows}
    return rows_of, [rows for rows in groups if len(rows) < min_rows]


def _shuffled(rows: Rows, client: str, seed: int) -> Rows:
    return numpy_rng(seed, "split", client).permutation(rows)


def _public_rows(shuffled: Mapping[str, Rows], wanted: int) -> tuple[list[str], Rows]:
    """Take whole clients, in order, until there are ``wanted`` rows; return them and exactly that many rows."""
    taken: list[str] = []
    available = 0
    for client, rows in shuffled.items():
        if available >= wanted:
            break
        taken.append(client)
        available += len(rows)
    if available < wanted:
        raise InputError(
            f"data.split.public_rows = {wanted} is more than the {available} rows of the {len(taken)} clients which "
            "are not unseen. Lower data.split.public_rows or data.split.unseen_clients."
        )
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(shuffled[client] for client in taken)])
    return taken, np.sort(rows[:wanted])


def _split(rows: Rows, split: SplitConfig) -> tuple[Rows, Rows, Rows]:
    """Divide one client's shuffled rows into training, validation and test rows."""
    enough = len(rows) >= 3
    least_validation = 1 if enough and split.validation else 0
    least_test = 1 if enough and split.test else 0
    validation = min(max(round(split.validation * len(rows)), least_validation), len(rows) - 1 - least_test)
    test = min(max(round(split.test * len(rows)), least_test), len(rows) - 1 - validation)
    held_out = validation + test
    return np.sort(rows[held_out:]), np.sort(rows[:validation]), np.sort(rows[validation:held_out])
