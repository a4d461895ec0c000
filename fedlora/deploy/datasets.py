"""What each side of a deployment holds: the server its own rows to evaluate on, a client its own rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from fedlora.config import Config, DataConfig
from fedlora.data.index import ClientIndex, build_index
from fedlora.data.sources import load_rows
from fedlora.errors import InputError
from fedlora.federation import Dataset, settled_schema
from fedlora.seeding import numpy_rng
from fedlora.tasks import Schema, Task

NO_ROWS = np.empty(0, dtype=np.int64)
FROM_FILES = ("csv", "jsonl", "parquet")


def server_dataset(config: Config, task: Task, clients: Sequence[str]) -> Dataset:
    """The server's own rows: ``data.split.public_rows`` of them to look at, all others to evaluate on.

    They are grouped by ``data.client`` where they have that column. Without ``data.path`` a server has no rows, and
    needs ``data.labels`` where a task has labels.

    Args:
        config: of the run.
        task: of the run.
        clients: who trains; the server has none of their rows.

    Raises:
        InputError: the rows cannot be read, or there are too few.
    """
    data = config.data
    nothing = data.name in FROM_FILES and data.path is None
    if nothing and data.labels is None and type(task).agreed is not Task.agreed:
        raise InputError(
            "The server has no rows to take the labels from: set data.labels, such as data.labels=[no,yes], to what "
            "all clients agree on, or data.path to rows of the server's own."
        )
    rows = pd.DataFrame(columns=list(task.columns)) if nothing else load_rows(data, task.columns, task.nested)
    schema = settled_schema(task, rows, data.labels)
    drawn = numpy_rng(config.seed, "public").permutation(len(rows))
    wanted = data.split.public_rows
    if wanted > len(rows):
        raise InputError(
            f"data.split.public_rows = {wanted} is more than the {len(rows)} rows that the server has. Lower it, or "
            "set data.path to more rows."
        )
    public, others = np.sort(drawn[:wanted]), np.sort(drawn[wanted:])
    owners = rows["client"].to_numpy()[others] if "client" in rows else np.full(len(others), "server", dtype=object)
    unseen = {str(owner): others[owners == owner] for owner in pd.unique(owners)}
    empty = dict.fromkeys(sorted(clients), NO_ROWS)
    return Dataset(rows, schema, ClientIndex(empty, empty, empty, unseen, public, 0, 0))


def client_dataset(config: Config, task: Task, client: str, own: DataConfig, others: Sequence[str] = ()) -> Dataset:
    """The rows of ``client``, divided into training, validation and test rows as in a simulation with that seed.

    Args:
        config: of the run.
        task: of the run.
        client: whose rows they are, all of them.
        own: where they are; its labels are those that all clients agree on.
        others: who else trains, where what this client starts from depends on it.

    Raises:
        InputError: the rows cannot be read, are too few, or have labels that were not agreed on.
    """
    rows = load_rows(own, task.columns, task.nested)
    schema = settled_schema(task, rows, own.labels)
    least = config.partition.min_rows
    if len(rows) < least:
        raise InputError(f"{own.path} has {len(rows)} rows, and a client takes part with partition.min_rows = {least}.")
    split = own.split.model_copy(update={"unseen_clients": 0.0, "public_rows": 0})
    owner = np.full(len(rows), client, dtype=object)
    index = build_index(owner, split, config.partition, config.seed)
    if others and client not in others:
        raise InputError(f"This client is '{client}', and the clients of the run are: {', '.join(others)}.")
    empty = dict.fromkeys(others, NO_ROWS)
    parts = {name: dict(sorted({**empty, **getattr(index, name)}.items())) for name in ("train", "validation", "test")}
    return Dataset(rows, schema, replace(index, **parts))


def own_data(config: Config, schema: Schema, path: str, **columns: str | None) -> DataConfig:
    """Where a client's own rows are, with columns named as in ``config`` unless the client names them.

    Args:
        config: of the run, whose ``data.path`` is the server's and is not used.
        schema: what all clients agree on.
        path: the client's file.
        columns: settings of ``data`` that differ here, such as ``text="review"``.

    Raises:
        InputError: the kind of the file is not known.
    """
    ending = path.split(".")[-2:] if path.endswith((".gz", ".bz2", ".xz", ".zip")) else path.rsplit(".", 1)[-1:]
    name = "imagefolder" if config.data.name == "imagefolder" else ending[0] if ending else ""
    if name not in (*FROM_FILES, "imagefolder"):
        raise InputError(f"--data {path}: its name must end in .csv, .jsonl or .parquet.")
    update = {"name": name, "path": path, "client": None, "group": None, "limit": None}
    labels = list(schema.labels) or None
    return config.data.model_copy(update=update | {"labels": labels} | columns)
