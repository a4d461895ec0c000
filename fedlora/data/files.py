"""Tables in files of the user's own: CSV, JSON lines, Parquet."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pandas as pd

from fedlora.config import DataConfig
from fedlora.errors import InputError

UNREADABLE = (OSError, ValueError, EOFError)  # what pandas, pyarrow, datasets and the decompressors raise


def csv(data: DataConfig) -> pd.DataFrame:
    """A CSV file with a header; pandas decompresses ``.gz``, ``.bz2``, ``.xz`` and ``.zip``.

    Every column but the label is text as it stands in the file, so that "007" keeps its zeros; only an empty field is
    missing, so that "NA" and "None" are words.
    """

    def read(path: Path) -> pd.DataFrame:
        text: dict[Hashable, type[str]] = {
            column: str for column in pd.read_csv(path, nrows=0).columns if column != data.label
        }
        return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""], low_memory=False)

    return _from_file(data, read)


def jsonl(data: DataConfig) -> pd.DataFrame:
    """A file with one JSON object a line. Values are as they stand there: no text becomes a number or a date."""
    as_found: Any = False  # what pandas documents, and its annotations do not know
    return _from_file(data, lambda path: pd.read_json(path, lines=True, dtype=as_found))


def parquet(data: DataConfig) -> pd.DataFrame:
    """A Parquet file, or a folder of them."""
    return _from_file(data, pd.read_parquet)


READERS: dict[str, Callable[[DataConfig], pd.DataFrame]] = {"csv": csv, "jsonl": jsonl, "parquet": parquet}
"""The sources of this file, by the name that ``data=`` takes."""


def required_path(data: DataConfig) -> str:
    """``data.path``.

    Raises:
        InputError: it is not set.
    """
    if not data.path:
        raise InputError(f"data.path is not set. Tell data={data.name} where its rows are: data.path=<path>.")
    return data.path


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _from_file(data: DataConfig, read: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    path = Path(required_path(data)).expanduser()
    if not path.exists():
        raise InputError(f"data.path = {data.path!r} does not exist (looked for {path.absolute()}). Correct data.path.")
    try:
        return read(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except UNREADABLE as error:
        raise InputError(
            f"data.path = {data.path!r} cannot be read as {data.name}: {first_line(error)}. "
            f"Mend the file or choose the source that fits it (data={', '.join((*READERS, 'hf'))})."
        ) from error
