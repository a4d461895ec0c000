"""The command ``fedlora bench``: measure, print, write."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.markdown import Markdown

from simulations import tables
from simulations.benchmark import machine, report, variants, workloads
from simulations.benchmark.driver import measure
from simulations.benchmark.figures import figures, sound


def bench(options: argparse.Namespace) -> int:
    """Run the benchmark of these flags; return 0, or 1 if a variant failed or trained something else.

    Raises:
        InputError: a name is not known.
    """
    chosen = variants.chosen(options.variants)
    document = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["fedlora", "bench", *_flags(options)]),
        "machine": machine.described(variants.THREADS),
        "versions": machine.versions(),
        "repeats": options.repeats,
        "workloads": [],
    }
    console = tables.console()
    for workload in _workloads(options):
        result = measure(workload, chosen, options.repeats, _tell)
        item: dict[str, Any] = {**result, "figures": figures(result)}
        document["workloads"].append(item)
        if not options.json:
            console.print(report.console_table(item))
            console.print(Markdown(report.notes(item)))
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        console.print(Markdown(report.header(document) + "\n\n" + report.LEGEND))
    if options.write:
        append(Path(options.write), report.markdown(document))
    return 0 if all(sound(item["figures"]) for item in document["workloads"]) else 1


def append(path: Path, section: str) -> None:
    """Add a section to the end of a Markdown file, or start the file with it."""
    before = path.read_text().rstrip("\n") + "\n\n" if path.exists() else "# Benchmark results\n\n"
    path.write_text(before + section)


def _workloads(options: argparse.Namespace) -> list[workloads.Workload]:
    sizes = (options.clients, options.steps, options.rows, options.lengths, options.backbones, options.real)
    known = workloads.grid(*sizes) if options.grid else workloads.NAMED
    return [workload.scaled(options.scale) for workload in workloads.chosen(known, options.only)]


def _flags(options: argparse.Namespace) -> list[str]:
    """The flags as they were given, but for how the document is printed."""
    ignored = {"command", "debug", "json", "write"}
    sizes = {"clients", "rows", "lengths", "steps", "backbones", "real"}
    flags = []
    for name, value in vars(options).items():
        if name in ignored or value in ((), False) or (name in sizes and not options.grid):
            continue
        words = [] if value is True else [",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"]
        flags += [f"--{name}", *words]
    return flags


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
