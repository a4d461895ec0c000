"""Is one method better, and was each given its chance: paired differences, and sensitivity to the tuned setting."""

from __future__ import annotations

import plotly.graph_objects as go

from simulations.paired import Difference, paired_differences
from simulations.report.canvas import Styles, blank, label, row_label, sized
from simulations.report.load import SPLITS, Section
from simulations.report.style import GREY


def differences(section: Section, styles: Styles) -> go.Figure | None:
    """Mean paired difference from the first method that trains and communicates, with its 95 % interval."""
    reference, found = paired(section)
    if reference is None or not found:
        return None
    figure = blank(f"difference from {label(reference)}<br>{section.score}", "")
    for each in sorted(found, key=lambda difference: difference.mean):
        verdict = _verdict(each)
        told = verdict in ("better", "worse")
        color = styles[each.method].color if told else GREY
        figure.add_scatter(
            x=[each.mean], y=[row_label(each.method)], mode="markers", name=label(each.method), showlegend=False,
            error_x={
                "array": [each.high - each.mean], "arrayminus": [each.mean - each.low], "color": color,
                "thickness": 2.5, "width": 6,
            },
            marker={
                "color": color, "symbol": "circle" if told else "circle-open", "size": 12,
                "line": {"width": 2.5, "color": color},
            },
            customdata=[[each.low, each.high, each.p, each.p_holm, each.seeds, verdict]],
            hovertemplate="%{x:+.4f}, from %{customdata[0]:+.4f} to %{customdata[1]:+.4f}<br>"
            "p = %{customdata[2]:.3g}, Holm %{customdata[3]:.3g}, %{customdata[4]} seeds: %{customdata[5]}"
            "<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        figure.add_annotation(
            x=1, xref="paper", xanchor="left", xshift=8, y=row_label(each.method), showarrow=False, align="left",
            text=f"p {_p(each.p)}<br>Holm {_p(each.p_holm)}<br>{verdict}", font={"size": 11},
        )  # fmt: skip
    figure.add_vline(0, line={"color": GREY, "width": 1.5, "dash": "dot"})
    for word, symbol in (("interval without zero", "circle"), ("not told apart", "circle-open")):
        marker = {"symbol": symbol, "color": GREY, "size": 11, "line": {"width": 2.5, "color": GREY}}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=word, marker=marker)
    figure.update_layout(margin={"r": 100}, legend={"itemclick": False, "itemdoubleclick": False})
    return sized(figure, len(found), 56).update_xaxes(tickformat=".2~f", tickangle=0)


def paired(section: Section) -> tuple[str | None, list[Difference]]:
    """The reference, and how every method with two seeds of its own among the reference's differs from it."""
    scored = section.runs[section.runs["score"].notna()]
    values = {
        str(name): dict(zip(own["seed"], own["score"], strict=True))
        for name, own in scored.groupby("method", sort=False)
    }
    trained = scored.loc[~scored["reference"], "method"]
    if trained.empty:
        return None, []
    return trained.iloc[0], paired_differences(values, trained.iloc[0])


def sensitivity(section: Section, styles: Styles) -> go.Figure | None:
    """Validation result against the tuned setting, one line a method."""
    tuning = section.tuning
    if tuning.empty:
        return None
    places = {value: _positive(value) for value in dict.fromkeys(tuning["value"])}
    logarithmic = None not in places.values()
    figure = blank(
        " or ".join(dict.fromkeys(tuning["setting"])), f"{section.metric.replace('_', ' ')}, {SPLITS['validation']}"
    )
    for name in [name for name in section.runs["method"].unique() if name in set(tuning["method"])]:
        style, own = styles[name], tuning[tuning["method"] == name]
        at = [places[value] if logarithmic else label(value) for value in own["value"]]
        figure.add_scatter(
            x=at, y=own["result"], mode="lines+markers", name=label(name), legendgroup=name,
            line={"color": style.color, "dash": style.dash, "width": 2.5},
            marker={"color": style.color, "symbol": style.symbol, "size": 6},
            hovertemplate="%{x}: %{y:.4f}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        if own["result"].nunique() > 1:
            word = "chosen, at the edge of what was tried" if own["at_the_edge"].any() else "chosen"
            figure.add_scatter(
                x=[x for x, chosen in zip(at, own["chosen"], strict=True) if chosen],
                y=own.loc[own["chosen"], "result"], mode="markers", legendgroup=name, showlegend=False,
                name=label(name), marker={"color": style.color, "symbol": "circle-open", "size": 17,
                                          "line": {"width": 2.5}},
                hovertemplate=f"%{{x}}: %{{y:.4f}}, {word}<extra>%{{fullData.name}}</extra>",
            )  # fmt: skip
    if logarithmic:
        ticks = sorted(set(filter(None, places.values())))
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    else:
        figure.update_xaxes(type="category")
    return figure


def _verdict(difference: Difference) -> str:
    """What the interval says, uncorrected; differences that are all equal (coarse scores, few seeds) say nothing."""
    if difference.low <= 0 <= difference.high:
        return "not told apart"
    if difference.low == difference.high:
        return "no spread"
    return "better" if difference.mean > 0 else "worse"


def _positive(value: str) -> float | None:
    """The number that a value is, if it is a positive one."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
