"""The table of a report: mean ± standard deviation over seeds, for people (Markdown, LaTeX) and for programs (CSV)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from tabulate import tabulate

from simulations.report.load import Frame, Section
from simulations.report.summary import gap_closed, over_seeds
from simulations.tables import human_bytes


@dataclass(frozen=True)
class Column:
    """A column: its key in :attr:`Section.runs` and in CSV, heading, meaning, how numbers are written, whether sent."""

    key: str
    heading: str
    meaning: str
    show: Callable[[float], str]
    travels: bool = False


COLUMNS = (
    Column("validation", "valid", "validation rows of training clients", "{:.3f}".format),
    Column("seen", "seen", "test rows of the same clients, pooled", "{:.3f}".format),
    Column("test", "test", "rows of unseen clients", "{:.3f}".format),
    Column("clients_mean", "client mean", "seen clients, each on its own test rows", "{:.3f}".format),
    Column("clients_worst_decile", "worst 10%", "the worst decile of those clients", "{:.3f}".format),
    Column("gap", "gap closed", "share of the way from local to central", "{:.0%}".format),
    Column("bytes", "total", "bytes of all messages of all clients, setup included", human_bytes, True),
    Column("up_per_round", "up/round", "tensor bytes of the cohort", human_bytes, True),
    Column("down_per_round", "down/round", "the same, to the clients", human_bytes, True),
    Column("setup", "setup", "tensor bytes sent once or when they change", human_bytes, True),
    Column("transport", "transport", "bytes of all messages on the clients' sockets: HTTP over TLS", human_bytes, True),
    Column("aggregation_error", "agg. error", "the largest of any round", "{:.1e}".format),
    Column("seconds_total", "seconds", "of the whole run", "{:.1f}".format),
)


def numbers(section: Section) -> Frame:
    """A row a method: ``method``, ``seeds`` and ``<key>_mean``, ``<key>_sd`` of every column that has numbers."""
    runs = section.runs.assign(gap=gap_closed(section.runs))
    sent = [column.key for column in COLUMNS if column.travels]
    runs[sent] = runs[sent].astype(float).mask(runs["reference"])
    keys = [column.key for column in COLUMNS if runs[column.key].notna().any()]
    return over_seeds(runs, keys).drop(columns="reference").reset_index()


def cells(section: Section) -> Frame:
    """The same as text, ``0.723 ± 0.011``; a dash for no number; no deviation of one seed or of equal bytes."""
    found = numbers(section)
    shown: Frame = pd.DataFrame({"method": found["method"], "seeds": found["seeds"].map(str)})
    for column in columns(found):
        pairs = zip(found[f"{column.key}_mean"], found[f"{column.key}_sd"], strict=True)
        shown[column.heading] = [_cell(column, mean, deviation) for mean, deviation in pairs]
    return shown


def columns(found: Frame) -> list[Column]:
    """The columns that a table has."""
    return [column for column in COLUMNS if f"{column.key}_mean" in found]


def _cell(column: Column, mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "-"
    if math.isnan(deviation) or (column.travels and column.show(mean + deviation) == column.show(mean)):
        return column.show(mean)
    return f"{column.show(mean)} ± {column.show(deviation)}"


def csv(sections: Sequence[Section]) -> str:
    """One CSV of all sections, numbers unrounded."""
    frames = [numbers(section).assign(section=section.title) for section in sections]
    whole: Frame = pd.concat(frames, ignore_index=True)
    return whole[["section", *(name for name in whole if name != "section")]].to_csv(index=False)


def markdown(sections: Sequence[Section]) -> str:
    """A table for each section, in Markdown."""
    return _texts(sections, "## {}\n\n{}\n", "pipe")


def latex(sections: Sequence[Section]) -> str:
    """A table for each section, in LaTeX with booktabs."""
    return _texts(sections, "% {}\n{}\n", "latex_booktabs").replace("±", "$\\pm$")


def _texts(sections: Sequence[Section], layout: str, style: str) -> str:
    texts = []
    for section in sections:
        shown = cells(section)
        align = ["left", *["right"] * (shown.shape[1] - 1)]
        body = tabulate(
            shown.to_numpy().tolist(), list(shown.columns), tablefmt=style, colalign=align, disable_numparse=True
        )
        texts.append(layout.format(section.title, body))
    return "\n".join(texts)


EXPORTS: Mapping[str, Callable[[Sequence[Section]], str]] = {".csv": csv, ".md": markdown, ".tex": latex}
"""File endings of tables, and what writes them."""
