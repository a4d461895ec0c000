"""The commands behind ``fedlora``: each returns an exit status; errors become one paragraph."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from fedlora.errors import FedloraError, InputError
from simulations import compose, plan, tables
from simulations.forget import forget
from simulations.simulate import resume, start


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Execute the chosen command and return its exit status."""
    notices, handler = logging.getLogger("fedlora.notices"), _NoticeHandler()
    notices.addHandler(handler)
    try:
        return COMMANDS[options.command](options, list(overrides))
    except KeyboardInterrupt:
        print("\nInterrupted. An unfinished run can be finished with 'fedlora resume RUN'.", file=sys.stderr)
        return 1
    except Exception as error:
        return _report(error, options.debug)
    finally:
        notices.removeHandler(handler)


def _simulate(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run or sweep through Hydra, then print the table."""
    finished: list[dict[str, Any]] = []
    failures: list[Exception] = []
    folders: list[Path] = []

    def job(composed: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        folders.append(folder)
        try:
            finished.append(start(compose.to_config(composed), folder, merged=options.merged))
        except Exception as error:  # Hydra would print its own text; a sweep goes on with its other trials
            failures.append(error)
            _report(error, options.debug)
        finally:
            _remove_if_empty(folder)

    arguments = [*(["--multirun"] if options.multirun else []), *compose.prepare_overrides(overrides)]
    command_line, sys.argv = sys.argv, ["fedlora", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="config")(job)()
    finally:
        sys.argv = command_line
        for folder in folders:
            _remove_if_empty(folder)
    if finished:
        console = tables.console()
        console.print(tables.comparison(finished))
        console.print(tables.caption(finished))
        for summary in finished:
            console.print(tables.samples(summary), end="")
        console.print(Text(f"Run folder: {folders[0] if len(folders) == 1 else folders[0].parent}"))
    return max((_exit_code(failure) for failure in failures), default=0)


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.compare:
        plans = _plans_of_all_methods([o for o in overrides if not o.startswith("method=")])
    else:
        plans = [plan.plan_run(compose.compose_config(overrides))]
    if options.json:
        document = plans if options.compare else plans[0]
        print(json.dumps({"methods": document} if options.compare else document, indent=2))
    else:
        tables.console().print(tables.plans(plans, options.bandwidth))
    return 0


def _plans_of_all_methods(overrides: list[str]) -> list[dict[str, Any]]:
    """A plan for every method that these settings suit; the others are named, with the reason."""
    plans: list[dict[str, Any]] = []
    refused: list[tuple[str, InputError]] = []
    for method in compose.options("method"):
        try:
            plans.append(plan.plan_run(compose.compose_config([*overrides, f"method={method}"])))
        except InputError as error:
            refused.append((method, error))
    if not plans:
        raise refused[0][1]
    for method, error in refused:
        logging.getLogger("fedlora.notices").warning("method=%s is left out: %s", method, error)
    return plans


def _methods(options: argparse.Namespace, overrides: list[str]) -> int:
    listing = plan.list_methods()
    if options.json:
        print(json.dumps({"methods": listing}, indent=2))
    else:
        tables.console().print(tables.methods(listing))
    return 0


def _resume(options: argparse.Namespace, overrides: list[str]) -> int:
    summary = resume(Path(options.run), merged=options.merged)
    console = tables.console()
    console.print(tables.comparison([summary]))
    console.print(tables.caption([summary]))
    return 0


def _forget(options: argparse.Namespace, overrides: list[str]) -> int:
    print(forget(Path(options.run), options.client)["text"])
    return 0


def _bench(options: argparse.Namespace, overrides: list[str]) -> int:
    from simulations.benchmark.bench import bench  # only this command needs it

    return bench(options)


COMMANDS = {
    "simulate": _simulate,
    "plan": _plan,
    "methods": _methods,
    "resume": _resume,
    "forget": _forget,
    "bench": _bench,
}


class _NoticeHandler(logging.Handler):
    """Prints every notice about the data once, however many trials a sweep has."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.told:
            self.told.add(text)
            Console(stderr=True).print(Text.assemble(("note: ", "bold yellow"), text), soft_wrap=True)


def _report(error: Exception, debug: bool) -> int:
    """Print one paragraph about ``error`` (and its traceback when asked) and return the exit status."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, compose.HYDRA_ERRORS):
        error = compose.explain(error)
    text = str(error)
    if not isinstance(error, FedloraError):
        text = f"{type(error).__name__}: {error}. This is a fault of fedlora; --debug shows where."
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)
    return _exit_code(error)


def _exit_code(error: Exception) -> int:
    if isinstance(error, compose.HYDRA_ERRORS):
        return 2
    return error.exit_code if isinstance(error, FedloraError) else 1


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
