"""A benchmark as tables: on the console, and as a dated section of a Markdown file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from simulations.benchmark.figures import best_peak
from simulations.benchmark.variants import VARIANTS
from simulations.tables import human_bytes

HEADER = (
    "variant", "s/round (min-max)", "clients/s", "tokens/s", "of peak", "memory", "vs loop", "tax, central",
    "tax, own", "tax, DP", "vs Flower",
)  # fmt: skip
LEGEND = """\
*s/round*: median, least and most of the repeats. In each repeat every variant trains one round in turn while the
processes of all others are stopped. *of peak*: 4 x P x tokens FLOPs by the time and by the fp32 matrix-product peak
measured here (by the bf16 peak after the stroke), tokens without padding: above 100 % where work is skipped.
*memory*: peak resident memory after the warm-up, summed over the processes of a variant. *vs loop*: times as fast as
the padded loop with as many processes (private ones: as the private loop). *tax*: how much longer than central
fine-tuning (plain PEFT at its best batch size; ours with the same packing and precision), or than the same program
without privacy (*DP*). *vs Flower*: times as fast as Flower's simulation with cached models.
Ratios are medians of the quotients within each repeat."""
QUIET = 0.05
"""Share of the cores that everything else may use before the times mean little."""


def header(document: Mapping[str, Any]) -> str:
    """What was run, where and with what, as Markdown lines."""
    return "\n".join(
        [
            f"`{document['command']}`",
            "",
            f"- {document['machine']}",
            f"- {document['versions']}",
            f"- {document['repeats']} repeats after a warm-up round",
        ]
    )


def console_table(item: Mapping[str, Any]) -> Table:
    """The table of one workload."""
    table = Table(title=f"{item['workload']}: {item['described']}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column(HEADER[0], no_wrap=True)
    for name in HEADER[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows(item["figures"]):
        table.add_row(*row)
    return table


def markdown(document: Mapping[str, Any]) -> str:
    """A whole section: header, for each workload its table, peak and losses, and what the words mean."""
    parts = [f"## {document['date']}", header(document)]
    for item in document["workloads"]:
        parts += [f"### {item['workload']}", item["described"], pipe_table(rows(item["figures"])), notes(item)]
    return "\n\n".join([*parts, LEGEND, variants_listed(document)]) + "\n"


def pipe_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table under :data:`HEADER`."""
    ruler = ["---", *["--:"] * (len(HEADER) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [HEADER, ruler, *lines])


def rows(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of a table."""
    return [_row(line) for line in lines]


def _row(line: Mapping[str, Any]) -> list[str]:
    if "error" in line:
        return [line["name"], "failed", *["-"] * (len(HEADER) - 2)]
    seconds, ratios = line["seconds"], line["ratios"]
    return [
        line["name"],
        f"{seconds['median']:.2f} ({seconds['min']:.2f}-{seconds['max']:.2f})",
        f"{line['clients_per_second']:.1f}",
        f"{line['tokens_per_second']:,.0f}",
        " / ".join(f"{share:.0%}" for share in line["share_of_peak"].values()),
        human_bytes(line["peak_memory"]),
        _times(ratios["speedup_over_loop"]),
        _percent(ratios["tax_over_central"]),
        _percent(ratios["tax_over_own_central"]),
        _percent(ratios["tax_of_privacy"]),
        _times(ratios["speedup_over_flower"]),
    ]


def notes(item: Mapping[str, Any]) -> str:
    """The machine's peak, what else it did meanwhile, and a line on the losses of every variant."""
    fp32, bf16 = (best_peak(item["peaks"], precision) / 1e9 for precision in ("fp32", "bf16"))
    measured = [line for line in item["figures"] if "error" not in line]
    others = max((line["other_load"] for line in measured), default=0.0)
    spread = ", ".join(f"{when} {peak['fp32'] / 1e9:.0f}" for when, peak in item["peaks"].items())
    lines = [
        f"- Peak: {fp32:.0f} GFLOP/s in fp32 ({spread}), {bf16:.0f} in bf16.",
        f"- Everything else on the machine used at most {others:.0%} of its cores during a round"
        + (". **Too much: these times mean little.**" if others > QUIET else "."),
        *(f"- {_loss(line)}" for line in measured),
        *(f"- `{line['name']}` failed: {line['error']}" for line in item["figures"] if "error" in line),
    ]
    return "\n".join(lines)


def _loss(line: Mapping[str, Any]) -> str:
    loss = line["loss"]
    batch = "" if line["batch_size"] is None else f", batch {line['batch_size']}"
    moved = f"`{line['name']}`{batch}: loss {loss['first']:.4f} in the warm-up, {loss['last']:.4f} in the last round"
    if loss["difference"] is None:
        return f"{moved}; nothing to compare it with."
    verdict = "right" if loss["right"] else "**WRONG**"
    return f"{moved}; from `{loss['same_as']}` by at most {loss['difference']:.1e} of {loss['allowed']:.0e}: {verdict}."


def variants_listed(document: Mapping[str, Any]) -> str:
    """What each variant of a document is, and the settings of ours."""
    measured = {line["name"] for item in document["workloads"] for line in item["figures"]}
    lines = []
    for variant in VARIANTS:
        settings = f": `{' '.join(variant.overrides)}`" if variant.overrides else ""
        lines += [f"- `{variant.name}`: {variant.about}{settings}"] if variant.name in measured else []
    return "\n".join(lines)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.0%}"
