"""``python -m simulations.published.private.analyse OUT RUNS...``: ``results.csv``, a row a method and epsilon.

Of tuned sweeps: means over seeds, the learning rate that was chosen, and the paired difference from FedIT at the same
epsilon with its 95 % interval; Holm's correction is over all rows.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
import yaml

from simulations.paired import holm, paired_differences
from simulations.report.load import Frame
from simulations.tuning import FILE

HEAD = "the head alone"


def methods_of(sweep: Path) -> Iterable[tuple[float | None, str, dict[str, Any]]]:
    """The epsilon, the name and the final runs of every method of a tuned sweep."""
    for found in json.loads((sweep / FILE).read_text())["methods"]:
        config = yaml.safe_load((sweep / found["folders"][0] / "config.yaml").read_text())
        epsilon = config["privacy"]["epsilon"] if config["privacy"]["name"] == "record" else None
        yield epsilon, HEAD if config["adapter"]["alpha"] < 1 else config["method"], found


def table(sweeps: Sequence[Path]) -> Frame:
    """Every method at every epsilon; last what was not private."""
    cells: dict[float | None, dict[str, dict[str, Any]]] = defaultdict(dict)
    for epsilon, method, found in (each for sweep in sweeps for each in methods_of(sweep)):
        cells[epsilon][method] = found
    rows: list[dict[str, Any]] = []
    for epsilon in sorted(cells, key=lambda value: value or float("inf")):
        values = {name: dict(zip(f["seeds"], f["client_mean"], strict=True)) for name, f in cells[epsilon].items()}
        differs = {each.method: each for each in paired_differences(values, "fedit")}
        for method, found in cells[epsilon].items():
            row = {
                "epsilon": epsilon,
                "method": method,
                "lr": found["value"],
                "lr_at_the_edge": found["at_the_edge"],
                "seeds": len(found["seeds"]),
                "accuracy": mean(found["client_mean"]),
                "accuracy_sd": stdev(found["client_mean"]),
                "megabytes": mean(found["bytes"]) / 1e6,
            }
            if method in differs:
                row |= {name: getattr(differs[method], name) for name in ("mean", "low", "high", "p")}
            rows.append(row)
    tested = [row for row in rows if "p" in row]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    return pd.DataFrame(rows).rename(columns={name: f"difference_{name}" for name in ("mean", "low", "high")})


def main(arguments: Sequence[str]) -> None:
    """Read the sweeps and write the table."""
    out, *sweeps = map(Path, arguments)
    table(sweeps).to_csv(out / "results.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main(sys.argv[1:])
