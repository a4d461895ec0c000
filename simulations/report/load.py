"""Run folders as tidy tables: which runs belong together, under which name, and their numbers as they were written."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fedlora.errors import InputError
from simulations.report.find import TunedSweep, find, tuned_sweeps

Frame = Any
"""A pandas DataFrame or Series, whose own annotations are unions that a type checker cannot follow."""
REFERENCES = ("zero_shot", "local", "central")
"""Methods that send nothing: what the others are compared with."""
SPLITS = {
    "seen": "test rows of seen clients",
    "test": "rows of unseen clients",
    "validation": "validation rows of seen clients",
}
SAME = ("data", "partition", "task", "backbone", "eval.max_rows", "eval.max_clients")
"""Settings that runs must share to be compared."""
FREE = ("seed", "run_dir", "engine", "checkpoint", "eval", "tracking", *SAME)
"""Settings that give runs of one method no name of their own: they change no result, or are :data:`SAME`."""
log = logging.getLogger("fedlora.notices")


@dataclass(frozen=True)
class Run:
    """The files of one finished run, and the tuned sweep that it is of."""

    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    clients: Frame
    sweep: TunedSweep | None


@dataclass(frozen=True)
class Section:
    """Runs that can be compared.

    Attributes:
        title: data, partition, task and backbone.
        metric: the main metric; larger is better.
        split: the key of :data:`SPLITS` whose rows the scores are taken on.
        runs: one row a run: ``method``, ``reference``, ``seed``, ``score``, ``epsilon`` and the ``unit`` that it is of,
            bytes, seconds and clients' statistics.
        rounds: one row a run and round: ``score``, ``loss``, ``bytes`` sent so far, ``aggregation_error``.
        clients: one row a run and seen client: ``value`` of the metric on its ``rows`` test rows; older runs have none.
        tuning: one row a method of a tuned sweep and value of the ``setting``: its validation ``result``, and whether
            it was ``chosen``, ``at_the_edge`` of what was tried.
        trials: how many trials of the tuned sweeps are left out.
        differs: settings in which this section differs from the others.
    """

    title: str
    metric: str
    split: str
    runs: Frame
    rounds: Frame
    clients: Frame
    tuning: Frame
    trials: int
    differs: dict[str, Any]

    @property
    def score(self) -> str:
        """What ``score`` is, in words."""
        return f"{self.metric.replace('_', ' ')}, {SPLITS[self.split]}"


def load(paths: Iterable[str | Path], split: str | None = None) -> list[Section]:
    """Read run folders, folders of sweeps (searched to any depth) and patterns such as ``runs/2026-*``.

    Of a tuned sweep only the final part counts: the chosen value of each method with all seeds.

    Args:
        paths: where to look.
        split: the rows that scores are taken on; by default the first of :data:`SPLITS` that all runs have.

    Returns:
        A section for every group of runs with the same data, partition, task and backbone.

    Raises:
        InputError: nothing finished is there, a file of a run cannot be read, or no run has ``split``.
    """
    found = find(paths)
    sweeps = tuned_sweeps(found)
    folders = [folder for folder in found if folder.parent not in sweeps or folder in sweeps[folder.parent].methods]
    trials = Counter(folder.parent for folder in found if folder not in folders)
    for place, count in trials.items():
        log.warning("Left out: %d trials that chose %s, in '%s'.", count, sweeps[place].setting, place)
    if not folders:
        raise InputError("These trials only chose a setting. Give the folder of their sweep: its final runs count.")
    unfinished = [folder for folder in folders if not (folder / "summary.json").exists()]
    if unfinished:
        log.warning("Left out, because they have no summary.json yet ('fedlora resume RUN' finishes a run): %s.",
                    ", ".join(map(str, unfinished)))  # fmt: skip
    runs = [read(folder, sweeps.get(folder.parent)) for folder in folders if folder not in unfinished]
    if not runs:
        raise InputError("None of these runs is finished. 'fedlora resume RUN' finishes a run.")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = {key: value for key, value in run.settings.items() if _within(key, SAME)}
        groups.setdefault(json.dumps([same, run.summary["main_metric"]], sort_keys=True, default=str), []).append(run)
    differing = differences([group[0].settings for group in groups.values()], SAME)
    sections = [
        _section(group, {key: group[0].settings.get(key) for key in differing}, split, trials)
        for group in groups.values()
    ]
    titles = [section.title for section in sections]
    return [section if titles.count(section.title) == 1 else _told_apart(section) for section in sections]


def read(folder: Path, sweep: TunedSweep | None = None) -> Run:
    """The files of a finished run of ``sweep``.

    Raises:
        InputError: a file is missing, damaged or of another version.
    """
    try:
        settings = flat(yaml.safe_load((folder / "config.yaml").read_text()))
        summary = json.loads((folder / "summary.json").read_text())
        rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        values = folder / "clients.parquet"
        clients: Frame = pd.read_parquet(values) if values.exists() else pd.DataFrame(columns=["kind"])
        run = Run(folder, settings, summary, rounds, clients, sweep)
        _row(run, "", "seen")
        _rounds(run, "", "seen")
        _clients(run, "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, yaml.YAMLError) as error:
        raise InputError(
            f"The run in '{folder}' cannot be read ({type(error).__name__}: {' '.join(str(error).split())}). "
            "Leave it out, or run it again."
        ) from error
    return run


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys, without those that say nothing (``null``, ``[]``): older runs lack them."""
    items: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            items |= flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            items[f"{prefix}{key}"] = value
    return items


def differences(settings: Sequence[Mapping[str, Any]], among: Sequence[str] = (), but: Sequence[str] = ()) -> list[str]:
    """Dotted keys whose values are not the same everywhere."""
    keys = dict.fromkeys(key for each in settings for key in each)
    chosen = [key for key in keys if (not among or _within(key, among)) and not _within(key, but)]
    return [key for key in chosen if len({json.dumps(each.get(key), default=str) for each in settings}) > 1]


def _within(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _section(runs: list[Run], differs: dict[str, Any], split: str | None, trials: Mapping[Path, int]) -> Section:
    metric = runs[0].summary["main_metric"]
    available = [s for s in SPLITS if all(f"{s}_{metric}" in run.summary["final"]["metrics"] for run in runs)]
    chosen = split or next(iter(available), "validation")
    if split and not any(f"{split}_{metric}" in run.summary["final"]["metrics"] for run in runs):
        raise InputError(f"No run has {metric} on {SPLITS[split]}. Choose --on {' or '.join(available) or 'another'}.")
    names = _names(runs)
    rows: Frame = pd.DataFrame([_row(run, name, chosen) for run, name in zip(runs, names, strict=True)])
    rounds: Frame = pd.DataFrame(
        [row for run, name in zip(runs, names, strict=True) for row in _rounds(run, name, chosen)]
    )
    kept = ~rows.duplicated(["method", "seed"], keep="last")
    for method, seed, folder in rows.loc[~kept, ["method", "seed", "folder"]].itertuples(index=False):
        log.warning("Left out: %s is another run of %s with seed %s and the same settings.", folder, method, seed)
    rounds = rounds[rounds["folder"].isin(rows.loc[kept, "folder"])]
    order = rows["kind"].map({name: place for place, name in enumerate(REFERENCES)}).fillna(len(REFERENCES))
    rows = rows[kept].assign(order=order[kept]).sort_values("order", kind="stable").drop(columns="order")
    named = [pair for pair in zip(runs, names, strict=True) if str(pair[0].folder) in set(rows["folder"])]
    return Section(
        title=_title(runs[0].settings),
        metric=metric,
        split=chosen,
        runs=rows.reset_index(drop=True),
        rounds=rounds,
        clients=pd.concat([_clients(run, name) for run, name in named], ignore_index=True),
        tuning=_tuning({name: run for run, name in named}),
        trials=sum(trials.get(place, 0) for place in {run.folder.parent for run in runs}),
        differs=differs,
    )


def _told_apart(section: Section) -> Section:
    """The section with what it differs in as part of its title."""
    own = ", ".join(f"{key}={value}" for key, value in section.differs.items())
    return replace(section, title=f"{section.title} ({own or section.metric})")


def _title(settings: Mapping[str, Any]) -> str:
    names = ((key, settings.get(f"{key}.name")) for key in ("data", "partition", "task", "backbone"))
    return ", ".join(f"{name} clients" if key == "partition" else str(name) for key, name in names)


def _names(runs: Sequence[Run]) -> list[str]:
    """Every run's label, with the settings in which runs of that label differ; all tuned values are one."""
    names, settings = [], [_tuned(run) for run in runs]
    labels = [run.summary["label"] for run in runs]
    for label, own in zip(labels, settings, strict=True):
        keys = differences([each for other, each in zip(labels, settings, strict=True) if other == label], but=FREE)
        short = [key.rpartition(".")[2] for key in keys]
        pairs = zip(keys, short, strict=True)
        names.append(" ".join([label, *(f"{s if short.count(s) == 1 else key}={own.get(key)}" for key, s in pairs)]))
    return names


def _tuned(run: Run) -> dict[str, Any]:
    """Its settings, with ``tuned`` for the value of what was tuned."""
    if run.sweep is None:
        return run.settings
    setting = run.sweep.setting
    return {key: value for key, value in run.settings.items() if not _within(key, (setting,))} | {setting: "tuned"}


def _row(run: Run, name: str, split: str) -> dict[str, Any]:
    summary = run.summary
    final, metric, totals = summary["final"], summary["main_metric"], summary["totals"]
    clients, error = final["clients"] or {}, summary["aggregation_error"] or {}
    privacy = summary.get("privacy") or {}  # of older runs, none
    return {
        "method": name,
        "reference": not summary["communicates"],
        "kind": summary["method"],
        "seed": summary["seed"],
        "folder": str(run.folder),
        "score": _number(final["metrics"].get(f"{split}_{metric}")),
        **{each: _number(final["metrics"].get(f"{each}_{metric}")) for each in SPLITS},
        **{f"clients_{key}": _number(clients.get(key)) for key in ("mean", "std", "worst_decile", "worst")},
        "unit": privacy.get("unit", ""),
        "epsilon": _number(privacy.get("epsilon")),
        "bytes": totals["message_up"] + totals["message_down"],
        "up_per_round": summary["per_round"]["payload_up"],
        "down_per_round": summary["per_round"]["payload_down"],
        "setup": totals["setup_bytes"],
        "transport": sum(_number(totals.get(f"transport_{way}")) for way in ("up", "down")),  # older runs have none
        "aggregation_error": _number(error.get("max")),
        **{f"seconds_{phase}": float(seconds) for phase, seconds in summary["seconds"].items()},
    }


def _rounds(run: Run, name: str, split: str) -> list[dict[str, Any]]:
    sent = accumulate(record["message_up"] + record["message_down"] for record in run.rounds)
    return [
        {
            "method": name,
            "reference": not run.summary["communicates"],
            "seed": run.summary["seed"],
            "folder": str(run.folder),
            "round": record["round"],
            "bytes": so_far,
            "score": _number(record["metrics"].get(f"{split}_{run.summary['main_metric']}")),
            "loss": _number(record["loss"]),
            "aggregation_error": _number(record["aggregation_error"]),
        }
        for record, so_far in zip(run.rounds, sent, strict=True)
    ]


def _clients(run: Run, name: str) -> Frame:
    found = run.clients[run.clients["kind"] == "seen"]
    if found.empty:
        return pd.DataFrame(columns=["method", "seed", "client", "rows", "value"])
    found = found.assign(method=name, seed=run.summary["seed"], value=found[run.summary["main_metric"]])
    return found[["method", "seed", "client", "rows", "value"]]


def _tuning(runs: Mapping[str, Run]) -> Frame:
    rows = []
    for name, run in runs.items():
        if run.sweep is not None:
            own = run.sweep.methods[run.folder]
            for value, result in own["curve"].items():
                chosen = value == own["value"]
                row = {"method": name, "setting": run.sweep.setting, "value": value, "result": result}
                rows.append({**row, "chosen": chosen, "at_the_edge": chosen and own["at_the_edge"]})
    return pd.DataFrame(rows, columns=["method", "setting", "value", "result", "chosen", "at_the_edge"])


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
