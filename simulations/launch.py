"""``fedlora simulate``: a run or a sweep through Hydra, and the table of what came of it."""

from __future__ import annotations

import math
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.text import Text

from simulations import compose, tables
from simulations.engines.pool import Pools
from simulations.messages import report, say
from simulations.run_folder import RunFolder
from simulations.simulate import start
from simulations.sweep import SweepStart, remove_if_empty, run_trial
from simulations.trials import Trial, TrialLog
from simulations.tuning import SEED, choose, compared


class Launch:
    """What Hydra calls, once for a run and once for every trial of a sweep.

    A launcher may call it in another process: then nothing that it keeps comes back, and the table is made from what
    the trials have written.
    """

    def __init__(self, merged: bool, debug: bool) -> None:
        """``merged``: whether whole models are written, too; ``debug``: whether errors show where they came from."""
        self.merged, self.debug = merged, debug
        self.pools = Pools()
        self.folder: Path | None = None
        self.summary: dict[str, Any] | None = None
        self.code = 0
        self.tuned = False
        self.seen: set[str] = set()

    def __call__(self, composed: DictConfig) -> float:
        """Run what Hydra has composed; returns the best validation value of the main metric, for sweepers.

        A trial without a result has the worst value, because sweepers stop at one that is not a number.
        """
        job = HydraConfig.get()
        folder = Path(job.runtime.output_dir)
        try:
            if job.mode is RunMode.MULTIRUN:
                summary = self._trial(composed, folder, list(job.overrides.task))
                maximised = job.sweeper.get("direction") == "maximize"
                return best(summary) if summary else (-math.inf if maximised else math.inf)
            self.folder = folder
            self.summary = start(compose.to_config(composed), folder, merged=self.merged)
            return best(self.summary)
        except Exception as error:  # Hydra would print its own text
            self.code = report(error, self.debug)
            return math.nan
        finally:
            remove_if_empty(folder)

    def _trial(self, composed: DictConfig, folder: Path, overrides: list[str]) -> dict[str, Any] | None:
        trial, summary, error = run_trial(composed, folder, overrides, merged=self.merged, pools=self.pools)
        self.seen.add(trial.config)
        if error is not None and self.debug:
            traceback.print_exception(error)
        if trial.status != "kept" or not self.tuned:  # the second part of a tuned sweep keeps what the first has run
            told(trial)
        return summary


def best(summary: dict[str, Any]) -> float:
    """The best validation value of the main metric; not a number where nothing was validated."""
    found = (summary["best"] or {"metrics": {}})["metrics"]
    return float(found.get(f"validation_{summary['main_metric']}", math.nan))


def final(summary: dict[str, Any] | None) -> float:
    """The validation value of the main metric after the last round, like the test value that is reported."""
    return (
        math.nan
        if summary is None
        else summary["final"]["metrics"].get(f"validation_{summary['main_metric']}", math.nan)
    )


def told(trial: Trial) -> None:
    """Say of a trial what its table does not."""
    name = SweepStart.name_of(trial)
    if trial.status == "kept":
        say("note", f"{name}: finished already, in {trial.folder}/", "bold")
    elif trial.status == "incompatible":
        say("skipped", f"{name}: {trial.reason}")
    elif trial.status == "failed":
        say("failed", f"{name}: {trial.reason} The sweep goes on.", "bold red")


def simulate(overrides: Sequence[str], *, multirun: bool, merged: bool, debug: bool) -> int:
    """Run or sweep through Hydra, print the table, and return the exit status."""
    launch = Launch(merged, debug)
    SweepStart.log = None
    prepared = compose.prepare_overrides(overrides)
    if multirun or compose.is_sweep(prepared):
        prepared = compose.in_every_trial(prepared)
    arguments = [*(["--multirun"] if multirun else []), *prepared]
    try:
        _call_hydra(launch, arguments)
        if SweepStart.log is not None and SweepStart.tuning:
            return _tuned(launch, arguments, SweepStart.log, SweepStart.tuning)
    finally:
        launch.pools.close()
    if SweepStart.log is not None:
        return _swept(SweepStart.log, SweepStart.outcomes(), launch.seen)
    if launch.summary is not None and launch.folder is not None:
        _print([launch.summary], launch.folder)
    return launch.code


def _call_hydra(launch: Launch, arguments: Sequence[str]) -> None:
    command_line, sys.argv = sys.argv, ["fedlora", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="config")(launch)()
    finally:
        sys.argv = command_line


def _tuned(launch: Launch, arguments: Sequence[str], log: TrialLog, tuning: Any) -> int:
    """The second part of a tuned sweep: the best value of each method with all seeds; see :mod:`simulations.tuning`."""
    tried = [trial for trial in SweepStart.outcomes() if trial.status in ("finished", "kept")]
    results = [(trial, final(RunFolder(log.path / trial.folder).read_summary())) for trial in tried]
    chosen = choose(results, tuning.setting, SweepStart.swept)
    launch.tuned = True
    seeds, before = ",".join(map(str, tuning.seeds)), len(log.read(SweepStart.skip))
    for choice in chosen:
        own = [*choice.given, f"{tuning.setting}={choice.value}", f"{SEED}={seeds}", f"run_dir={log.path}"]
        replaced = {"--multirun", *(override.partition("=")[0] for override in own)}
        fixed = [override for override in arguments if override.partition("=")[0].lstrip("+") not in replaced]
        _call_hydra(launch, ["--multirun", *fixed, *own])
    trials = SweepStart.outcomes(before)
    good = [trial for trial in trials if trial.status in ("finished", "kept")]
    if good:
        document = compared(log.path, chosen, good, tuning.setting)
        console = tables.console()
        console.print(tables.tuned(document))
        console.print(tables.paired(document))
        console.print(Text(f"Run folder: {log.path}"))
    return _status(SweepStart.outcomes(), launch.seen)


def _swept(log: TrialLog, trials: Sequence[Trial], seen: set[str]) -> int:
    """Print the table of a sweep, and return its exit status."""
    results = [trial for trial in trials if trial.status in ("finished", "kept")]
    if results:
        summaries = [RunFolder(log.path / trial.folder).read_summary() for trial in results]
        _print(
            [summary for summary in summaries if summary],
            log.path,
            [SweepStart.name_of(trial, but="method") for trial in results],
        )
    return _status(trials, seen)


def _status(trials: Sequence[Trial], seen: set[str]) -> int:
    """The exit status of a sweep: that of a failed trial, or 0 if any trial has a result."""
    for trial in trials:  # of other processes
        if trial.config not in seen:
            told(trial)
    counted = Counter(trial.status for trial in trials)
    if set(counted) - {"finished"}:
        said = ", ".join(f"{number} {status}" for status, number in sorted(counted.items()))
        tables.console().print(Text(f"{len(trials)} trials: {said}."))
    codes = [trial.exit_code or 1 for trial in trials if trial.status in ("failed", "started")]
    refused = [trial.exit_code for trial in trials if trial.status == "incompatible"]
    return max(codes or (refused if len(refused) == len(trials) else []), default=0)


def _print(summaries: Sequence[dict[str, Any]], folder: Path, names: Sequence[str] = ()) -> None:
    console = tables.console()
    console.print(tables.comparison(summaries, names))
    console.print(tables.caption(summaries))
    for summary in summaries:
        console.print(tables.samples(summary), end="")
    console.print(Text(f"Run folder: {folder}"))
