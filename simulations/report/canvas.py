"""What every figure of a report starts from: an empty figure, and names as plotly shall write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from simulations.report.load import Section
from simulations.report.style import Style

Styles = Mapping[str, Style]


@dataclass(frozen=True)
class Picture:
    """A kind of figure: its heading, how to read it, and what draws it."""

    name: str
    title: str
    reading: str
    draw: Callable[[Section, Styles], go.Figure | None]


def label(name: object) -> str:
    """A name that plotly does not take for markup."""
    return escape(str(name), quote=False)


def row_label(name: object) -> str:
    """The name of a row: settings on a second line."""
    return label(name).replace(" ", "<br>", 1)


def sized(figure: go.Figure, count: int, each: int = 36) -> go.Figure:
    """A figure with room for ``count`` rows of ``each`` pixels."""
    return figure.update_layout(height=170 + each * count)


def blank(x_title: str, y_title: str) -> go.Figure:
    """An empty figure; the page gives it the colours of its theme."""
    return go.Figure(
        layout={
            "template": None,
            "height": 430,
            "margin": {"l": 12, "r": 12, "t": 12, "b": 12},
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"},
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "hovermode": "closest",
            "showlegend": True,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "maxheight": 2000},
            "xaxis": _axis(x_title),
            "yaxis": _axis(y_title),
        }
    )


def _axis(title: str) -> dict[str, object]:
    text = {"text": title, "font": {"size": 13}}
    return {"title": text, "automargin": True, "zeroline": False, "gridcolor": "#d8dee4"}
