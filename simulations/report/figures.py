"""The pictures of a report: each a function from a :class:`Section` to a plotly figure, or ``None`` without numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from simulations.report.load import Section
from simulations.report.style import GREY, PHASES, Style
from simulations.report.summary import front, gap_closed, over_seeds
from simulations.tables import human_bytes

Styles = Mapping[str, Style]


@dataclass(frozen=True)
class Picture:
    """A kind of figure: its heading, how to read it, and what draws it."""

    name: str
    title: str
    reading: str
    draw: Callable[[Section, Styles], go.Figure | None]


def pareto(section: Section, styles: Styles) -> go.Figure | None:
    """Score against all bytes, with the Pareto front over the means of the seeds."""
    runs = section.runs[section.runs["score"].notna()]
    means = over_seeds(runs[~runs["reference"]], ["score", "bytes"])
    if means.empty:
        return None
    best = front(means["bytes_mean"], means["score_mean"])
    line = means[best].sort_values("bytes_mean")
    figure = _figure("total bytes, setup included", section.score)
    figure.add_scatter(
        x=line["bytes_mean"], y=line["score_mean"], mode="lines", name="Pareto front", hoverinfo="skip",
        line={"color": GREY, "width": 2, "shape": "hv"},
    )  # fmt: skip
    for name, row in means.iterrows():
        style, own, fade = styles[str(name)], runs[runs["method"] == name], 1.0 if best[name] else 0.6
        figure.add_scatter(
            x=own["bytes"], y=own["score"], mode="markers", legendgroup=str(name), showlegend=False, opacity=0.4,
            marker={"color": style.color, "symbol": style.symbol, "size": 6}, name=_label(name),
            customdata=[[seed, human_bytes(count)] for seed, count in zip(own["seed"], own["bytes"], strict=True)],
            hovertemplate="seed %{customdata[0]}: %{y:.4f}, %{customdata[1]}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[row["bytes_mean"]], y=[row["score_mean"]], mode="markers", legendgroup=str(name), opacity=fade,
            name=_label(name),
            marker={"color": style.color, "symbol": style.symbol, "size": 13},
            error_y={"array": [row["score_sd"]], "color": style.color, "thickness": 1.5},
            customdata=[[human_bytes(row["bytes_mean"]), row["seeds"], "on the front" if best[name] else "dominated"]],
            hovertemplate="mean of %{customdata[1]}: %{y:.4f}, %{customdata[0]}, %{customdata[2]}"
            "<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    ends = [means["bytes_mean"].min() / 1.5, means["bytes_mean"].max() * 1.5]
    _references(figure, section, styles, ends)
    steps = "D2" if ends[1] < 1000 * ends[0] else 1  # marks at 1, 2 and 5, or at powers of ten
    return figure.update_xaxes(type="log", tickformat="~s", ticksuffix="B", dtick=steps)


def curve_by_round(section: Section, styles: Styles) -> go.Figure | None:
    """Score after each evaluated round."""
    return _curves(section, styles, "round", "score", "round", section.score)


def curve_by_bytes(section: Section, styles: Styles) -> go.Figure | None:
    """Score against the bytes sent so far."""
    figure = _curves(section, styles, "bytes", "score", "bytes sent so far, setup included", section.score)
    return figure and figure.update_xaxes(tickformat="~s", ticksuffix="B", rangemode="tozero")


def training_loss(section: Section, styles: Styles) -> go.Figure | None:
    """Mean training loss of each round's cohort."""
    return _curves(section, styles, "round", "loss", "round", "training loss")


def aggregation_error(section: Section, styles: Styles) -> go.Figure | None:
    """Relative distance between the aggregate and the exact mean, by round."""
    figure = _curves(section, styles, "round", "aggregation_error", "round", "relative aggregation error")
    return figure and figure.update_yaxes(type="log", tickformat=".0e", dtick=1)


def clients(section: Section, styles: Styles) -> go.Figure | None:
    """Worst client, worst decile, mean and standard deviation over clients."""
    names = ["worst", "worst_decile", "mean", "std"]
    means = over_seeds(section.runs, [f"clients_{name}" for name in names])
    means = means[means["clients_mean_mean"].notna()]
    if means.empty:
        return None
    figure = _figure(f"{section.metric.replace('_', ' ')} of each client", "")
    words = ["worst client", "mean of the worst decile", "mean of all clients"]
    for name, row in means[::-1].iterrows():
        worst, decile, mean, std = (row[f"clients_{each}_mean"] for each in names)
        figure.add_scatter(
            x=[worst, decile, mean], y=[_line(name)] * 3, mode="lines+markers", name=_label(name), customdata=words,
            error_x={"array": [0, 0, std], "color": styles[str(name)].color, "thickness": 1, "width": 5},
            marker={"color": styles[str(name)].color, "symbol": ["x", "triangle-up", "circle"], "size": [9, 11, 12]},
            line={"color": styles[str(name)].color, "width": 4}, showlegend=False,
            hovertemplate="%{customdata}: %{x:.4f}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    for word, symbol in zip(words, ("x", "triangle-up", "circle"), strict=True):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=word, marker={"symbol": symbol, "color": GREY, "size": 10}
        )
    return _rows(figure, len(means)).update_layout(legend={"itemclick": False, "itemdoubleclick": False})


def gap(section: Section, styles: Styles) -> go.Figure | None:
    """Share of the way from ``local`` to ``central`` that each method has gone."""
    shares = over_seeds(section.runs.assign(gap=gap_closed(section.runs)), ["gap"])
    shares = shares[shares["gap_mean"].notna()]
    if shares.empty:
        return None
    figure = _figure("share of the gap closed: 0 % is local, 100 % is central", "")
    for name, row in shares[::-1].iterrows():
        figure.add_bar(
            x=[row["gap_mean"]], y=[_line(name)], orientation="h", name=_label(name), showlegend=False,
            marker={"color": styles[str(name)].color, "line": {"width": 0}},
            error_x={"array": [row["gap_sd"]], "color": GREY},
            hovertemplate="%{x:.1%}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    for at in (0, 1):
        figure.add_vline(at, line={"color": GREY, "width": 1.5, "dash": "dot"})
    return _rows(figure, len(shares)).update_xaxes(tickformat=".0%")


def time_by_phase(section: Section, styles: Styles) -> go.Figure | None:
    """Seconds of a run, by phase."""
    means = over_seeds(section.runs, [f"seconds_{phase}" for phase in PHASES])[::-1]
    figure = _figure("seconds of a run", "")
    for phase, color in PHASES.items():
        figure.add_bar(
            x=means[f"seconds_{phase}_mean"], y=[_line(name) for name in means.index], orientation="h", name=phase,
            marker={"color": color, "line": {"width": 0}},
            hovertemplate="%{x:.2f} s<extra>%{y}: %{fullData.name}</extra>",
        )  # fmt: skip
    return _rows(figure, len(means)).update_layout(barmode="stack", legend={"traceorder": "normal"})


def _curves(section: Section, styles: Styles, x: str, y: str, x_title: str, y_title: str) -> go.Figure | None:
    """Means over seeds with a band from the least to the greatest seed."""
    found = section.rounds[section.rounds[y].notna()]
    if x == "bytes":
        found = found[~found["reference"]]
    drawn = found.groupby("method")["round"].transform("nunique") > 1
    found = found[drawn]
    if found.empty:
        return None
    figure = _figure(x_title, y_title)
    for name in [name for name in section.runs["method"].unique() if name in set(found["method"])]:
        style, rounds = styles[name], found[found["method"] == name].groupby("round")
        across, mean, low, high = (
            rounds[x].mean() if x != "round" else None,
            *(getattr(rounds[y], how)() for how in ("mean", "min", "max")),
        )
        places = list(mean.index if across is None else across)
        if (high > low).any():
            figure.add_scatter(
                x=places + places[::-1], y=[*high, *low[::-1]], fill="toself", fillcolor=style.band(), mode="none",
                hoverinfo="skip", legendgroup=name, showlegend=False, name=_label(name),
            )  # fmt: skip
        figure.add_scatter(
            x=places, y=mean, mode="lines+markers", name=_label(name), legendgroup=name, customdata=list(mean.index),
            line={"color": style.color, "dash": style.dash, "width": 2.5},
            marker={"color": style.color, "symbol": style.symbol, "size": 6},
            hovertemplate="round %{customdata}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    if y == "score":
        ends = [float(found[x].min()), float(found[x].max())]
        _references(figure, section, styles, ends, but=set(found["method"]))
    return figure


def _references(
    figure: go.Figure, section: Section, styles: Styles, ends: list[float], but: set[str] | None = None
) -> None:
    """A horizontal line for every method that sends nothing."""
    means = over_seeds(section.runs[section.runs["reference"]], ["score"])
    for name, row in means[means["score_mean"].notna()].iterrows():
        if name not in (but or ()):
            figure.add_scatter(
                x=ends, y=[row["score_mean"]] * 2, mode="lines", name=_label(name),
                line={"color": GREY, "dash": styles[str(name)].dash, "width": 1.5},
                hovertemplate="%{y:.4f}<extra>%{fullData.name}</extra>",
            )  # fmt: skip


def _label(name: object) -> str:
    """A name that plotly does not take for markup."""
    return escape(str(name), quote=False)


def _line(name: object) -> str:
    """The name of a row: settings on a second line."""
    return _label(name).replace(" ", "<br>", 1)


def _rows(figure: go.Figure, count: int) -> go.Figure:
    return figure.update_layout(height=170 + 36 * count)


def _figure(x_title: str, y_title: str) -> go.Figure:
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


PICTURES: tuple[Picture, ...] = (
    Picture(
        "pareto", "Quality against communication",
        "Up and left is better. The line is the Pareto front of means over seeds: no method beats one on it in both "
        "bytes and score. Pale methods are dominated. Small marks are single seeds, bars one standard deviation.",
        pareto,
    ),
    Picture(
        "curve-rounds", "Learning curve by round",
        "Line: mean over seeds; band: from the worst to the best seed. Only evaluated rounds are drawn.",
        curve_by_round,
    ),
    Picture(
        "curve-bytes", "Learning curve by bytes",
        "The same scores against what has been sent until then: the further left a curve rises, the cheaper it learns.",
        curve_by_bytes,
    ),
    Picture(
        "loss", "Training loss by round",
        "As the round's cohort reports it; mean over seeds, band from the least to the greatest. Ragged where "
        "each round trains other clients.",
        training_loss,
    ),
    Picture(
        "error", "Aggregation error by round",
        "Relative distance between the aggregated update and the exact mean of the clients' updates (log axis). About "
        "1e-6 and below is rounding: aggregation is exact. A method that aggregates nothing has no line.",
        aggregation_error,
    ),
    Picture(
        "clients", "Spread over clients",
        "Right is better. On the clients' own test rows: the worst client, the mean of the worst decile, the "
        "mean of all evaluated clients and one standard deviation over clients (thin bar); each averaged over seeds.",
        clients,
    ),
    Picture(
        "gap", "Share of the local to central gap closed",
        "(score - local) / (central - local), for each seed that has both and a gap. Bars: means over seeds, whiskers "
        "one standard deviation. Below 0 %: worse than every client on its own.",
        gap,
    ),
    Picture(
        "time", "Time by phase",
        "Wall-clock seconds of a whole run on the machine that simulated it, mean over seeds. It compares the cost of "
        "simulating, not of deploying.",
        time_by_phase,
    ),
)  # fmt: skip
