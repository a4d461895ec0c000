"""A fair comparison: every method gets the same values of a setting to choose from, and chooses on validation rows.

A sweep with ``tuning.setting`` has two parts. The first is an ordinary sweep over methods, values of that setting and a
few seeds. Then the value with the best mean validation result over these seeds is run with all of ``tuning.seeds``;
what was run already is kept. Test rows have no part in the choice.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.store import write_atomically
from simulations.paired import paired_differences
from simulations.run_folder import RunFolder
from simulations.trials import Trial

FILE = "comparison.json"
SEED = "seed"


@dataclass(frozen=True)
class Tuned:
    """What a method chose.

    Attributes:
        given: the overrides that set it apart from the others, such as ``("method=ffa",)``.
        value: the value of the setting that it chose.
        curve: mean validation result over the tuning seeds, for each value that was tried.
        at_the_edge: whether the value is the smallest or the largest that was tried: a wider range might be better.
    """

    given: tuple[str, ...]
    value: str
    curve: dict[str, float]
    at_the_edge: bool


def choose(results: Sequence[tuple[Trial, float]], setting: str, swept: frozenset[str]) -> list[Tuned]:
    """The best value of ``setting`` for every combination of the other swept settings but the seed.

    Args:
        results: trials of the first part with their validation results.
        setting: what is tuned.
        swept: names of the settings that had several values.
    """
    tried: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial, result in results:
        pairs = [(override.partition("=")[0].lstrip("+"), override) for override in trial.overrides]
        given = tuple(o for key, o in pairs if key in swept and key not in (setting, SEED))
        value = next((o.partition("=")[2] for key, o in pairs if key == setting), "")
        tried[given][value].append(result)
    chosen = []
    for given, by_value in tried.items():
        curve = {value: float(np.mean(found)) for value, found in sorted(by_value.items(), key=_numeric)}
        values = [value for value, mean in curve.items() if not math.isnan(mean)]
        if values:
            best = max(values, key=curve.__getitem__)
            edge = len(set(curve.values())) > 1 and best in (next(iter(curve)), list(curve)[-1])
            chosen.append(Tuned(given, best, curve, edge))
    return chosen


def _numeric(item: tuple[str, Any]) -> tuple[float, str]:
    try:
        return float(item[0]), item[0]
    except ValueError:
        return math.inf, item[0]


def compared(folder: Path, tuned: Sequence[Tuned], trials: Sequence[Trial], setting: str) -> dict[str, Any]:
    """Gather the second part of a tuned sweep, and write it to ``comparison.json``.

    Args:
        folder: of the sweep.
        tuned: what each method chose.
        trials: of the second part, with a result.
        setting: what was tuned.

    Returns:
        ``methods``: one object each with ``label``, ``value``, ``curve``, ``at_the_edge``, and ``seeds``, ``folders``
        (of its runs), ``valid``, ``test``, ``client_mean``, ``worst_decile`` and ``bytes`` as lists over seeds
        (``None`` where a method has no such number); ``paired``: differences of test results from those of the first
        method that has any.
    """
    methods = []
    for choice in tuned:
        own = [
            t for t in trials if set(choice.given) <= set(t.overrides) and f"{setting}={choice.value}" in t.overrides
        ]
        found = {trial.folder: RunFolder(folder / trial.folder).read_summary() for trial in own}
        runs = sorted(((s, name) for name, s in found.items() if s is not None), key=lambda run: run[0]["seed"])
        if runs:
            methods.append(_method(choice, [s for s, _ in runs], [name for _, name in runs]))
    values = {
        method["label"]: dict(zip(method["seeds"], method["test"], strict=True))
        for method in methods
        if None not in method["test"]
    }
    trained = [method["label"] for method in methods if method["communicates"] and method["label"] in values]
    paired = [asdict(difference) for difference in paired_differences(values, trained[0])] if trained else []
    document = {"setting": setting, "reference": trained[0] if trained else None, "methods": methods, "paired": paired}
    write_atomically(folder / FILE, json.dumps(document, indent=2) + "\n")
    return document


def _method(choice: Tuned, summaries: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> dict[str, Any]:
    metric = summaries[0]["main_metric"]

    def all_of(read: Any) -> list[float | None]:
        return [read(summary) for summary in summaries]

    return {
        "label": summaries[0]["label"],
        "communicates": summaries[0]["communicates"],
        **asdict(choice),
        "metric": metric,
        "seeds": [summary["seed"] for summary in summaries],
        "folders": list(folders),
        "valid": all_of(lambda s: s["final"]["metrics"].get(f"validation_{metric}")),
        "test": all_of(lambda s: s["final"]["metrics"].get(f"test_{metric}")),
        "client_mean": all_of(lambda s: (s["final"]["clients"] or {}).get("mean")),
        "worst_decile": all_of(lambda s: (s["final"]["clients"] or {}).get("worst_decile")),
        "bytes": all_of(lambda s: s["totals"]["message_up"] + s["totals"]["message_down"]),
        "aggregation_error": max((s["aggregation_error"] or {}).get("max", 0.0) for s in summaries),
    }
