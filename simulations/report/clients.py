"""How results are distributed over clients."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from simulations.report.canvas import Styles, blank, label, row_label, sized
from simulations.report.load import Frame, Section
from simulations.report.style import GREY
from simulations.report.summary import over_seeds

POINTS = 600
"""Clients of a method that are drawn; of more, these ranks, evenly spaced from the worst to the best."""
MARKS = {
    "worst_decile": ("mean of the worst decile", "triangle-up"),
    "mean": ("mean of all clients", "circle"),
    "worst": ("worst client", "x"),
}


def clients(section: Section, styles: Styles) -> go.Figure | None:
    """The clients of all seeds as box and points, and worst client, worst decile and mean, each averaged over seeds."""
    means = over_seeds(section.runs, [f"clients_{name}" for name in MARKS])
    means = means[means["clients_mean_mean"].notna()]
    if means.empty:
        return None
    figure = blank(f"{section.metric.replace('_', ' ')} of each client", "")
    for name, row in means[::-1].iterrows():
        color = styles[str(name)].color
        own = _thinned(section.clients[section.clients["method"] == name])
        figure.add_box(
            x=own["value"], y=[row_label(name)] * len(own), orientation="h", name=label(name), showlegend=False,
            boxpoints="all", jitter=0.7, pointpos=0, width=0.72, line={"color": color, "width": 1.5},
            fillcolor=styles[str(name)].band(), marker={"color": color, "size": 4, "opacity": 0.35},
            hoveron="points",
            customdata=[[label(each) for each in row] for row in own[["client", "rows", "seed"]].to_numpy()],
            hovertemplate="client %{customdata[0]}: %{x:.4f} on %{customdata[1]} rows, seed %{customdata[2]}"
            "<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[row[f"clients_{each}_mean"] for each in MARKS], y=[row_label(name)] * len(MARKS), name=label(name),
            mode="markers", showlegend=False, customdata=[word for word, _ in MARKS.values()],
            marker={
                "color": color, "symbol": [symbol for _, symbol in MARKS.values()], "size": [18, 12, 7], "opacity": 1,
                "line": {"color": "#ffffff", "width": [1.5, 1.5, 1]},
            },
            hovertemplate="%{customdata}: %{x:.4f}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    for word, symbol in MARKS.values():
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=word, marker={"symbol": symbol, "color": GREY, "size": 10}
        )
    each = 36 if section.clients.empty else 56
    return sized(figure, len(means), each).update_layout(legend={"itemclick": False, "itemdoubleclick": False})


def _thinned(values: Frame) -> Frame:
    ordered = values.sort_values("value", kind="stable")
    return ordered.iloc[np.linspace(0, len(ordered) - 1, min(len(ordered), POINTS)).round().astype(int)]
