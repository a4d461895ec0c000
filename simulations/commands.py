"""The commands behind ``fedlora``: each returns an exit status; errors become one paragraph."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.errors import InputError
from simulations import compose, plan, tables
from simulations.forget import forget
from simulations.launch import simulate
from simulations.messages import NoticeHandler, report
from simulations.run_folder import RunFolder
from simulations.simulate import resume


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Execute the chosen command and return its exit status."""
    notices, handler = logging.getLogger("fedlora.notices"), NoticeHandler()
    notices.addHandler(handler)
    try:
        return COMMANDS[options.command](options, list(overrides))
    except KeyboardInterrupt:
        print("\nInterrupted. An unfinished run can be finished with 'fedlora resume RUN'.", file=sys.stderr)
        return 1
    except Exception as error:
        return report(error, options.debug)
    finally:
        notices.removeHandler(handler)


def _simulate(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run or sweep through Hydra, then print the table."""
    return simulate(overrides, multirun=options.multirun, merged=options.merged, debug=options.debug)


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
    run = Path(options.run)
    if RunFolder(run).read_config().engine.name == "deploy":
        from simulations.deploy.serve import serve_again

        return _told(serve_again(run, merged=options.merged))
    return _told(resume(run, merged=options.merged))


def _told(summary: dict[str, Any]) -> int:
    console = tables.console()
    console.print(tables.comparison([summary]))
    console.print(tables.caption([summary]))
    return 0


def _forget(options: argparse.Namespace, overrides: list[str]) -> int:
    print(forget(Path(options.run), options.client)["text"])
    return 0


def _certs(options: argparse.Namespace, overrides: list[str]) -> int:
    from simulations.certs import client, server  # only this command needs it

    folder = Path(options.folder)
    print(server(folder, options.host, options.days) if options.kind == "server" else client(folder, options.name))
    return 0


def _audit(options: argparse.Namespace, overrides: list[str]) -> int:
    from fedlora.deploy.audit import AUDIT, verify  # only this command needs it

    log = Path(options.log)
    log = log / AUDIT if log.is_dir() else log
    if not log.is_file():
        raise InputError(f"There is no audit log {log}.")
    verdict = verify(log)
    print(f"{log}: {verdict}")
    return 0 if verdict.broken is None else 1


def _report(options: argparse.Namespace, overrides: list[str]) -> int:
    from simulations.report import Report  # only this command needs it

    files = Report.of(*options.runs, on=options.on).write(
        options.output, options.table, options.figures, options.format
    )
    print(f"Report: {', '.join(map(str, files))}")
    return 0


def _bench(options: argparse.Namespace, overrides: list[str]) -> int:
    from simulations.benchmark.bench import bench  # only this command needs it

    return bench(options)


def _split(options: argparse.Namespace, overrides: list[str]) -> int:
    from simulations.split import split

    for path in split(compose.compose_config(overrides), Path(options.folder)):
        print(path)
    return 0


def _serve(options: argparse.Namespace, overrides: list[str]) -> int:
    from simulations.deploy.command import serve  # flower's server side takes a second to import

    return _told(serve(options, compose.compose_config(overrides)))


def _join(options: argparse.Namespace, overrides: list[str]) -> int:
    from simulations.deploy.command import check, join

    if options.check:
        return check(options, overrides)
    try:
        join(options, overrides)
    except KeyboardInterrupt:
        print("\nLeft.", file=sys.stderr)
    return 0


COMMANDS = {
    "simulate": _simulate,
    "plan": _plan,
    "methods": _methods,
    "resume": _resume,
    "forget": _forget,
    "split": _split,
    "serve": _serve,
    "join": _join,
    "certs": _certs,
    "audit": _audit,
    "report": _report,
    "bench": _bench,
}
