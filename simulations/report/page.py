"""One HTML page with everything in it: plotly.js, figures, tables and their downloads. It asks nothing of a network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from fedlora import __version__
from simulations.report import table
from simulations.report.figures import PICTURES
from simulations.report.load import Section
from simulations.report.style import Style

DOWNLOADS = {".csv": ("CSV", "text/csv"), ".md": ("Markdown", "text/markdown"), ".tex": ("LaTeX", "text/x-tex")}


def render(sections: Sequence[Section], drawn: Sequence[Mapping[str, go.Figure]], styles: Mapping[str, Style]) -> str:
    """The page of ``sections`` with their figures by name."""
    folder = files("simulations.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html.jinja").read_text())
    return template.render(
        version=__version__,
        css=(folder / "page.css").read_text(),
        script=(folder / "page.js").read_text(),
        plotly=get_plotlyjs(),
        sections=[_view(at, *pair, styles) for at, pair in enumerate(zip(sections, drawn, strict=True))],
        downloads=[
            {"format": name, "file": f"report{ending}", "uri": _uri(table.EXPORTS[ending](sections), kind)}
            for ending, (name, kind) in DOWNLOADS.items()
        ],
    )


def _view(at: int, section: Section, drawn: Mapping[str, go.Figure], styles: Mapping[str, Style]) -> dict[str, Any]:
    shown, numbers = table.cells(section), table.numbers(section)
    return {
        "id": f"section-{at + 1}",
        "title": section.title,
        "score": section.score,
        "differs": [f"{key} = {value}" for key, value in section.differs.items()],
        "seeds": sorted(int(seed) for seed in section.runs["seed"].unique()),
        "runs": len(section.runs),
        "tuned": " and ".join(dict.fromkeys(section.tuning["setting"])),
        "trials": section.trials,
        "uneven": len({frozenset(own) for _, own in section.runs.groupby("method")["seed"]}) > 1,
        "figures": [
            {
                "id": f"{picture.name}-{at + 1}",
                "title": picture.title,
                "reading": picture.reading,
                "json": _script_safe(drawn[picture.name].to_json() or ""),
            }
            for picture in PICTURES
            if picture.name in drawn
        ],
        "headings": [("method", ""), ("seeds", "runs with different seeds")]
        + [(column.heading, column.meaning) for column in table.columns(numbers)],
        "rows": [
            {"color": styles[row[0]].color, "cells": [cell.split(" ± ") for cell in row]}
            for row in shown.itertuples(index=False, name=None)
        ],
    }


def _script_safe(text: str) -> str:
    """JSON that cannot end the script element it is in."""
    return text.replace("<", "\\u003c")


def _uri(text: str, kind: str) -> str:
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
