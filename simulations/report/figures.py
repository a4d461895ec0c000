"""The pictures of a report: each a function from a :class:`Section` to a plotly figure, or ``None`` without numbers."""

from __future__ import annotations

import plotly.graph_objects as go

from simulations.report.canvas import Picture, Styles, blank, label, row_label, sized
from simulations.report.clients import clients
from simulations.report.comparisons import differences, sensitivity
from simulations.report.load import Section
from simulations.report.privacy import epsilon
from simulations.report.style import GREY, PHASES
from simulations.report.summary import front, gap_closed, over_seeds
from simulations.tables import human_bytes


def pareto(section: Section, styles: Styles) -> go.Figure | None:
    """Score against all bytes, with the Pareto front over the means of the seeds."""
    runs = section.runs[section.runs["score"].notna()]
    means = over_seeds(runs[~runs["reference"]], ["score", "bytes"])
    if means.empty:
        return None
    best = front(means["bytes_mean"], means["score_mean"])
    line = means[best].sort_values("bytes_mean")
    figure = blank("total bytes, setup included", section.score)
    figure.add_scatter(
        x=line["bytes_mean"], y=line["score_mean"], mode="lines", name="Pareto front", hoverinfo="skip",
        line={"color": GREY, "width": 2, "shape": "hv"},
    )  # fmt: skip
    for name, row in means.iterrows():
        style, own, fade = styles[str(name)], runs[runs["method"] == name], 1.0 if best[name] else 0.6
        figure.add_scatter(
            x=own["bytes"], y=own["score"], mode="markers", legendgroup=str(name), showlegend=False, opacity=0.4,
            marker={"color": style.color, "symbol": style.symbol, "size": 6}, name=label(name),
            customdata=[[seed, human_bytes(count)] for seed, count in zip(own["seed"], own["bytes"], strict=True)],
            hovertemplate="seed %{customdata[0]}: %{y:.4f}, %{customdata[1]}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[row["bytes_mean"]], y=[row["score_mean"]], mode="markers", legendgroup=str(name), opacity=fade,
            name=label(name),
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


def gap(section: Section, styles: Styles) -> go.Figure | None:
    """Share of the way from ``local`` to ``central`` that each method has gone."""
    shares = over_seeds(section.runs.assign(gap=gap_closed(section.runs)), ["gap"])
    shares = shares[shares["gap_mean"].notna()]
    if shares.empty:
        return None
    figure = blank("share of the gap closed: 0 % is local, 100 % is central", "")
    for name, row in shares[::-1].iterrows():
        figure.add_bar(
            x=[row["gap_mean"]], y=[row_label(name)], orientation="h", name=label(name), showlegend=False,
            marker={"color": styles[str(name)].color, "line": {"width": 0}},
            error_x={"array": [row["gap_sd"]], "color": GREY},
            hovertemplate="%{x:.1%}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    for at in (0, 1):
        figure.add_vline(at, line={"color": GREY, "width": 1.5, "dash": "dot"})
    return sized(figure, len(shares)).update_xaxes(tickformat=".0%")


def time_by_phase(section: Section, styles: Styles) -> go.Figure | None:
    """Seconds of a run, by phase."""
    means = over_seeds(section.runs, [f"seconds_{phase}" for phase in PHASES])[::-1]
    figure = blank("seconds of a run", "")
    for phase, color in PHASES.items():
        figure.add_bar(
            x=means[f"seconds_{phase}_mean"], y=[row_label(name) for name in means.index], orientation="h", name=phase,
            marker={"color": color, "line": {"width": 0}},
            hovertemplate="%{x:.2f} s<extra>%{y}: %{fullData.name}</extra>",
        )  # fmt: skip
    return sized(figure, len(means)).update_layout(barmode="stack", legend={"traceorder": "normal"})


def _curves(section: Section, styles: Styles, x: str, y: str, x_title: str, y_title: str) -> go.Figure | None:
    """Means over seeds with a band from the least to the greatest seed."""
    found = section.rounds[section.rounds[y].notna()]
    if x == "bytes":
        found = found[~found["reference"]]
    drawn = found.groupby("method")["round"].transform("nunique") > 1
    found = found[drawn]
    if found.empty:
        return None
    figure = blank(x_title, y_title)
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
                hoverinfo="skip", legendgroup=name, showlegend=False, name=label(name),
            )  # fmt: skip
        figure.add_scatter(
            x=places, y=mean, mode="lines+markers", name=label(name), legendgroup=name, customdata=list(mean.index),
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
                x=ends, y=[row["score_mean"]] * 2, mode="lines", name=label(name),
                line={"color": GREY, "dash": styles[str(name)].dash, "width": 1.5},
                hovertemplate="%{y:.4f}<extra>%{fullData.name}</extra>",
            )  # fmt: skip


PICTURES: tuple[Picture, ...] = (
    Picture(
        "pareto", "Quality against communication",
        "Up and left is better. The line is the Pareto front of means over seeds: no method beats one on it in both "
        "bytes and score. Pale methods are dominated. Small marks are single seeds, bars one standard deviation.",
        pareto,
    ),
    Picture(
        "epsilon", "Quality against privacy",
        "Up and left is better: less may be found out, at a better score. Mean over seeds, whiskers one standard "
        "deviation. Simulated, not private: a deployment with these settings would have this epsilon, and its delta is "
        "in each run's summary. What epsilon does not cover (tuning, metrics, counts) is in the documentation.",
        epsilon,
    ),
    Picture(
        "differences", "Differences from a reference",
        "Right of zero is better than the reference. Mean of the differences within each common seed and its 95 % "
        "interval (Student's t); p of the paired t-test, and corrected by Holm for the number of methods. Hollow "
        "and grey: the interval holds zero, or all differences are equal (no spread), so these seeds do not tell the "
        "two apart.",
        differences,
    ),
    Picture(
        "clients", "Distribution over clients",
        "Right is better. A point is a client on its own test rows, of any seed; a box holds the middle half, its line "
        "is the median. Large marks: worst client, mean of the worst decile and of all, each averaged over seeds.",
        clients,
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
        "sensitivity", "Sensitivity to the tuned setting",
        "Mean validation result of the tuning seeds at each value that was tried; rings: what the method chose. A "
        "flat line needs no tuning; a ring at the end of a line asks for a wider range.",
        sensitivity,
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
