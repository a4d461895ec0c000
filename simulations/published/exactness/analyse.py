"""``python -m simulations.published.exactness.analyse OUT RUNS...``: ``results.csv`` and ``exactness.svg`` of the grid.

A row for every backbone, skew, number of local steps and method: means over seeds, and the paired difference from FedIT
with its 95 % interval; Holm's correction is over all rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml
from matplotlib.figure import Figure

from simulations.paired import holm, paired_differences
from simulations.report.load import Frame

CELL = ["layers", "alpha", "local_steps"]
METHODS = {"fedit": "FedIT, approximate", "fedex": "FedEx-LoRA, exact", "ffa": "FFA-LoRA, exact"}
COLOURS = ("#0072b2", "#d55e00", "#009e73")


def read(folder: Path) -> dict[str, object]:
    """One finished run: its cell of the grid, its method and seed, and what came out."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    errors = [found for each in rounds if (found := each["aggregation_error"]) is not None]
    path = config["backbone"].get("path")
    return {
        "layers": int(path.rpartition("-")[2]) if path else 6,
        "alpha": config["partition"]["alpha"],
        "local_steps": config["client"]["local_steps"],
        "method": summary["method"],
        "seed": summary["seed"],
        "accuracy": summary["final"]["metrics"]["seen_accuracy"],
        "worst_decile": summary["final"]["clients"]["worst_decile"],
        "error": sum(errors) / len(errors) if errors else None,
        "bytes": summary["totals"]["message_up"] + summary["totals"]["message_down"],
    }


def table(runs: Frame) -> Frame:
    """Means over seeds of every cell and method, and how it differs from FedIT within seeds."""
    rows, p_values = [], []
    for cell, own in runs.groupby(CELL):
        values = {
            str(method): dict(zip(found["seed"], found["accuracy"], strict=True))
            for method, found in own.groupby("method")
        }
        differs = {each.method: each for each in paired_differences(values, "fedit")}
        for method in METHODS:
            found = own[own["method"] == method]
            row = {
                **dict(zip(CELL, cell, strict=True)),
                "method": method,
                "seeds": len(found),
                "accuracy": found["accuracy"].mean(),
                "accuracy_sd": found["accuracy"].std(),
                "worst_decile": found["worst_decile"].mean(),
                "aggregation_error": found["error"].mean(),
                "megabytes": found["bytes"].mean() / 1e6,
            }
            if difference := differs.get(method):
                row |= {name: getattr(difference, name) for name in ("mean", "low", "high", "p")}
                p_values.append((len(rows), difference.p))
            rows.append(row)
    for (at, _), corrected in zip(p_values, holm([p for _, p in p_values]), strict=True):
        rows[at]["p_holm"] = corrected
    return pd.DataFrame(rows).rename(columns={name: f"difference_{name}" for name in ("mean", "low", "high")})


def draw(found: Frame, file: Path) -> None:
    """Accuracy and aggregation error against local steps, a column for each skew."""
    grid = found[found["layers"] == 6]
    skews = sorted(grid["alpha"].unique())
    figure = Figure(figsize=(4.2 * len(skews), 6), layout="constrained")
    axes = figure.subplots(2, len(skews), sharex=True, sharey="row", squeeze=False)
    for column, alpha in enumerate(skews):
        for (method, name), colour in zip(METHODS.items(), COLOURS, strict=True):
            own = grid[(grid["alpha"] == alpha) & (grid["method"] == method)]
            axes[0, column].errorbar(
                own["local_steps"], own["accuracy"], own["accuracy_sd"], label=name, color=colour, marker="o", capsize=3
            )
            axes[1, column].plot(own["local_steps"], own["aggregation_error"], color=colour, marker="o")
        axes[0, column].set_title(f"alpha = {alpha:g}")
        axes[1, column].set(xscale="log", yscale="log", xlabel="local steps a round, 64 in all")
        axes[1, column].set_xticks([2, 8, 32], ["2", "8", "32"], minor=False)
    axes[0, 0].set_ylabel("accuracy, test rows of the clients")
    axes[1, 0].set_ylabel("aggregation error, mean over rounds")
    axes[0, 0].legend(frameon=False)
    figure.savefig(file)


def main(arguments: Sequence[str]) -> None:
    """Read the runs in the folders of sweeps and write both files."""
    out, *sweeps = map(Path, arguments)
    runs = pd.DataFrame([read(file.parent) for sweep in sweeps for file in sorted(sweep.glob("*/summary.json"))])
    found = table(runs)
    found.to_csv(out / "results.csv", index=False, float_format="%.6g")
    draw(found, out / "exactness.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
