"""Tables for people: the comparison of finished runs, the plan, the list of methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedlora.privacy.statement import SIMULATED


def console() -> Console:
    """Standard output; a file or pipe is 140 columns wide, so that no table is cut."""
    out = Console()
    return out if out.is_terminal else Console(width=140)


def comparison(summaries: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> Table:
    """One row a run: accuracy, clients, bytes, exactness, time; ``names`` say what else sets the runs apart."""
    metric = summaries[0]["main_metric"].replace("_", " ")
    table = Table(title=f"{metric}, last round", title_justify="left")
    table.add_column("method", no_wrap=True)
    if any(names):
        table.add_column("trial")
    tuned = any(summary["final"]["personalised_clients"] for summary in summaries)
    for column in (
        "valid", "test", "client mean", "worst 10%", *(["tuned mean", "tuned 10%"] if tuned else []),
        "up/round", "down/round", "setup", "transport", "agg. error", "seconds",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for number, summary in enumerate(summaries):
        final, name = summary["final"], summary["main_metric"]
        clients, personal = final["clients"] or {}, final["personalised_clients"] or {}
        sent = summary["communicates"]
        error = summary["aggregation_error"]
        table.add_row(
            _label(summary),
            *([escape(names[number])] if any(names) else []),
            _number(final["metrics"].get(f"validation_{name}")),
            _number(final["metrics"].get(f"test_{name}")),
            _number(clients.get("mean")),
            _number(clients.get("worst_decile")),
            *([_number(personal.get("mean")), _number(personal.get("worst_decile"))] if tuned else []),
            human_bytes(summary["per_round"]["payload_up"]) if sent else "-",
            human_bytes(summary["per_round"]["payload_down"]) if sent else "-",
            human_bytes(summary["totals"]["setup_bytes"]) if sent else "-",
            human_bytes(summary["totals"]["transport_up"] + summary["totals"]["transport_down"]) if sent else "-",
            "-" if error is None else f"{error['max']:.1e}",
            f"{summary['seconds']['total']:.1f}",
        )
    return table


def caption(summaries: Sequence[Mapping[str, Any]]) -> Text:
    """What the reader must know to read the table."""
    seeds = sorted({summary["seed"] for summary in summaries})
    clients = summaries[0]["clients"]
    lines = [
        f"{clients['population']} training clients, {clients['unseen']} unseen ones (test); "
        f"{clients['evaluated']} seen clients on their own test rows (client mean, worst 10%).",
        "Payload bytes: tensors of the whole cohort in a round; setup: sent once, over the run; transport: what all "
        "messages cost on the clients' sockets, over the run. agg. error: largest of any round.",
    ]
    losses = [(s["label"], s["start"]["metrics"], s["final"]["metrics"]) for s in summaries if s["rounds"]]
    if any(summary["final"]["personalised_clients"] for summary in summaries):
        lines.append("tuned: the same clients, each after a round of training the global model on its own rows.")
    moved = [
        f"{name} {start['validation_loss']:.3f} → {final['validation_loss']:.3f}"
        for name, start, final in losses
        if "validation_loss" in start and "validation_loss" in final
    ]
    if moved:
        lines.append(f"Validation loss before and after training: {', '.join(moved)}.")
    for summary in summaries:
        if summary.get("privacy"):
            lines.append(f"{summary['label']}: {summary['privacy']['statement']}")
        if summary["target"] is not None:
            lines.append(_reached(summary))
    lines.append(f"Peak memory of the process: {human_bytes(max(s['memory']['peak_bytes'] for s in summaries))}.")
    if len(summaries) > 1 and len(seeds) == 1:
        lines.append(f"One seed ({seeds[0]}): a demonstration, not a ranking.")
    return Text("\n".join(lines), style="dim")


def _label(item: Mapping[str, Any]) -> str:
    """The label of a run as a cell; what a private one says of itself is on lines of its own."""
    return escape(item["label"].replace(", ", "\n", 1).replace(f" ({SIMULATED})", f"\n({SIMULATED})"))


def _spending(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """What private runs will spend, in one line for all that spend alike."""
    alike: dict[str, list[str]] = {}
    for item in items:
        if privacy := item["privacy"]:
            said = f"epsilon = {_bound(privacy['epsilon'])}, delta = {privacy['delta']:.2g}{_mechanism(item, privacy)}"
            alike.setdefault(said, []).append(item["label"].partition(", ")[0])
    return [f"{', '.join(labels)} ({SIMULATED}): {said}." for said, labels in alike.items()]


def _mechanism(item: Mapping[str, Any], privacy: Mapping[str, Any]) -> str:
    if "clients" not in privacy:
        return f", noise multiplier = {privacy['noise_multiplier']:.4g} in {item['rounds']} rounds"
    clients = [
        f"a client with {client['rows']} rows: noise multiplier {client['noise_multiplier']:.3g}, {client['steps']} "
        f"steps at sample rate {client['sample_rate']:.3g}"
        for client in privacy["clients"]
    ]
    return f"; {'; '.join(clients)}"


def _bound(epsilon: float | None) -> str:
    return "no bound" if epsilon is None else f"{epsilon:.4g}"


def _reached(summary: Mapping[str, Any]) -> str:
    """One sentence: what the target cost."""
    target = summary["target"]
    what = f"{summary['label']}: {target['metric'].replace('_', ' ')} {target['value']:g}"
    if target["round"] is None:
        return f"{what} was not reached."
    return f"{what} after {target['round']} rounds, {human_bytes(target['bytes'])}, {target['seconds']:.1f} s."


def samples(summary: Mapping[str, Any]) -> Text:
    """Generated answers of one run, before and after training."""
    text = Text()
    for sample in summary["samples"]:
        text.append(f"\n{summary['label']}, a test row\n", style="bold")
        for name, key in (("prompt", "prompt"), ("reference", "reference"), ("before", "before"), ("after", "answer")):
            text.append(f"{name:>10}  ", style="dim").append(" ".join(sample[key].split()) + "\n")
    return text


def plans(items: Sequence[Mapping[str, Any]], bandwidth: float) -> Table:
    """One row a method: parameters, bytes, time on the link, memory and work."""
    clients = max(item["clients_per_round"] for item in items)
    rounds = max(item["rounds"] for item in items)
    title = f"{rounds} rounds, {clients:.0f} clients a round, a link of {bandwidth:g} Mbit/s; a client and round:"
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "trained": lambda item: f"{item['trainable_params']:,}",
        "up": lambda item: human_bytes(item["payload_up_per_client"]),
        "down": lambda item: human_bytes(item["payload_down_per_client"]),
        "setup": lambda item: human_bytes(item["setup_bytes_per_client"]),
        "link": lambda item: f"{item['transport_bytes_per_client_round'] * 8 / bandwidth / 1e6:.2f} s",
        "memory": lambda item: human_bytes(item["client_memory_bytes"]),
        "GFLOP": lambda item: f"{item['client_flops_per_round'] / 1e9:.1f}",
        "whole run": lambda item: human_bytes(item["total_bytes"]),
        "its setup": lambda item: human_bytes(item["setup_bytes"]),
        "transport": lambda item: human_bytes(item["total_transport_bytes"]),
        "simulating": lambda item: human_bytes(item["run_memory_bytes"]),
    }
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for item in items:
        name = escape(item["label"].partition(", ")[0])  # what a private plan says of itself is in the caption
        table.add_row(name, *(show(item) for show in columns.values()))
    explained = (
        "trained: parameters; up, down: payload; setup: frozen tensors, once or when they change; link: seconds for "
        "all bytes on it; whole run: bytes of all messages of all clients, and the setup in them; transport: "
        "what they cost on the clients' sockets, HTTP over TLS; simulating: memory here."
    )
    table.caption = escape("\n".join([*_spending(items), explained]))
    table.caption_justify = "left"
    return table


def methods(listing: Sequence[Mapping[str, Any]]) -> Table:
    """One row a method of ``conf/method``."""
    table = Table(title="method=...", title_justify="left")
    for column in ("method", "adapter", "strategy", "aggregation", "client.lr", "what it is"):
        table.add_column(column)
    for item in listing:
        exact = {True: "exact", False: "approximate", None: "-"}[item["exact"]]
        table.add_row(item["method"], item["adapter"], item["strategy"], exact, f"{item['lr']:g}", item["description"])
    return table


def human_bytes(count: float) -> str:
    """``1.2 MB``; decimal units, as links are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def tuned(document: Mapping[str, Any]) -> Table:
    """One row a method, the best mean test result first: its tuned setting, and mean and deviation over seeds."""
    setting = document["setting"].rpartition(".")[2]
    methods = sorted(document["methods"], key=lambda m: -_mean(m["test"]) if None not in m["test"] else math.inf)
    metric, seeds = methods[0]["metric"].replace("_", " "), len(methods[0]["seeds"])
    caption = (
        f"mean ± standard deviation over seeds; {setting} chosen on validation rows; *: the edge of what was tried"
    )
    table = Table(title=f"{metric}, last round, {seeds} seeds", caption=caption, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in (setting, "valid", "test", "client mean", "worst 10%", "bytes, the run", "agg. error"):
        table.add_column(column, justify="right", no_wrap=True)
    for method in methods:
        sent = method["communicates"]
        table.add_row(
            escape(method["label"]),
            f"{method['value']}{'*' if method['at_the_edge'] else ''}"
            if len(set(method["curve"].values())) > 1
            else "-",
            *(_spread(method[key]) for key in ("valid", "test", "client_mean", "worst_decile")),
            human_bytes(_mean(method["bytes"])) if sent else "-",
            f"{method['aggregation_error']:.1e}" if method["aggregation_error"] else "-",
        )
    return table


def paired(document: Mapping[str, Any]) -> Table:
    """Differences from the reference within each seed."""
    table = Table(
        title=f"test, difference from {document['reference']}, the same seeds",
        caption="95 % confidence interval and p of the paired t-test; Holm: corrected for the number of methods",
        title_justify="left",
    )
    for column in ("method", "difference", "95 % interval", "p", "p, Holm"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in sorted(document["paired"], key=lambda row: -row["mean"]):
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
        table.add_row(escape(row["method"]), f"{row['mean']:+.3f}", interval, f"{row['p']:.3f}", f"{row['p_holm']:.3f}")
    return table


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of a sample, or a dash where there is none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    return f"{_mean(known):.3f} ± {statistics.stdev(known) if len(known) > 1 else 0:.3f}"
