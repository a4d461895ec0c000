"""``fedlora split``: write what each client of a simulation owns to a file of its own, as a deployment has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.store import folder_name


def split(config: Config, folder: Path) -> list[Path]:
    """Write ``<client>.csv`` for every training client and ``server.csv`` with the rows of all unseen clients.

    The columns are named ``text``, ``label``, ..., and ``client`` in the server's file.

    Raises:
        InputError: the folder exists already, or the rows are no table of texts.
    """
    everyone = config.cohort.model_copy(update={"size": None})
    federation = Federation(config.model_copy(update={"cohort": everyone}))
    rows, index = federation.dataset.rows, federation.index
    if "image" in rows:
        raise InputError("fedlora split writes tables of texts; pictures are in a folder for each class already.")
    if folder.exists():
        raise InputError(f"{folder} exists already. Choose a new folder.")
    folder.mkdir(parents=True)
    written = []
    for client in index.clients:
        own = np.sort(np.concatenate([index.train[client], index.validation[client], index.test[client]]))
        written.append(_write(rows.iloc[own].drop(columns=["client", "group"], errors="ignore"), folder, client))
    unseen = [rows.iloc[own].assign(client=client) for client, own in index.unseen.items()]
    return [*written, *_server(unseen, folder)]


def _server(unseen: Sequence[pd.DataFrame], folder: Path) -> list[Path]:
    return [_write(pd.concat(unseen), folder, "server")] if unseen else []


def _write(rows: pd.DataFrame, folder: Path, name: str) -> Path:
    path = folder / f"{folder_name(name)}.csv"
    rows.to_csv(path, index=False)
    return path
