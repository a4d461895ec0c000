"""The picture of what privacy costs: score against epsilon, beside the same methods without noise."""

from __future__ import annotations

import plotly.graph_objects as go

from simulations.report.canvas import Styles, blank, label
from simulations.report.load import Section
from simulations.report.summary import over_seeds


def epsilon(section: Section, styles: Styles) -> go.Figure | None:
    """Score against the epsilon that was spent, a line a method; dotted: the method without privacy."""
    scored = section.runs[section.runs["score"].notna()]
    private, public = scored[scored["epsilon"].notna()], scored[scored["unit"] == ""]
    if private.empty:
        return None
    figure = blank("epsilon, of the client or run that has spent most", section.score)
    ends = [float(private["epsilon"].min()) / 1.2, float(private["epsilon"].max()) * 1.2]
    for (kind, unit), own in private.groupby(["kind", "unit"], sort=False):
        means = over_seeds(own, ["score", "epsilon"]).sort_values("epsilon_mean")
        style = styles[str(means.index[0])]
        figure.add_scatter(
            x=means["epsilon_mean"], y=means["score_mean"], mode="lines+markers", name=label(f"{kind}, each {unit}"),
            line={"color": style.color, "dash": style.dash, "width": 2.5},
            marker={"color": style.color, "symbol": style.symbol, "size": 9},
            error_y={"array": means["score_sd"].fillna(0.0), "color": style.color, "thickness": 1.5},
            customdata=means[["seeds"]],
            hovertemplate="epsilon %{x:.3g}: %{y:.4f}, mean of %{customdata[0]}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    for name, row in over_seeds(public[public["kind"].isin(private["kind"])], ["score"]).iterrows():
        kind = public.loc[public["method"] == name, "kind"].iloc[0]
        first = private.loc[private["kind"] == kind].sort_values("epsilon")["method"].iloc[0]
        figure.add_scatter(
            x=ends, y=[row["score_mean"]] * 2, mode="lines", name=label(f"{name}, without privacy"),
            line={"color": styles[str(first)].color, "dash": "dot", "width": 1.5},
            hovertemplate="%{y:.4f}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    return figure.update_xaxes(type="log")
