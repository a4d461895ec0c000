"""The trials of a sweep: each is run once, whatever becomes of the others, and the sweep's folder remembers which.

A sweep that is repeated into the same folder keeps what is finished and resumes what was interrupted. Launchers may
run trials in processes of their own: ``trials.jsonl`` is all that trials and the command that started them share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fedlora.errors import InputError
from simulations.compose import to_config
from simulations.engines.pool import Pools
from simulations.messages import described
from simulations.run_folder import RunFolder
from simulations.simulate import resume, start
from simulations.trials import Trial, TrialLog, fingerprint


def run_trial(
    composed: DictConfig, folder: Path, overrides: Sequence[str], *, merged: bool, pools: Pools
) -> tuple[Trial, dict[str, Any] | None, Exception | None]:
    """Run one trial, unless the sweep has it already; then it is kept, or finished if it was interrupted.

    Args:
        composed: its configuration, as Hydra gives it.
        folder: where it should go; if another trial is there, it goes beside it.
        overrides: what it was given.
        merged: whether the whole model is written, too.
        pools: keeps Ray actors for the next trial.

    Returns:
        What became of it, its summary, and the error that it ended with.
    """
    log, trial = TrialLog(folder.parent), Trial(list(overrides), " ".join(overrides), folder.name, "started")
    target, kept = folder, False
    try:
        config = to_config(composed)
        key = fingerprint(config)
        known = log.folder_of(key)
        target = _free(folder) if known is None else folder.parent / known
        kept = known is not None and RunFolder(target).summary_file.exists()
        trial = replace(trial, config=key, folder=target.name)
        log.add(trial)
        if known is None:
            summary = start(config, target, merged=merged, pools=pools)
        else:
            summary = resume(target, merged=merged, pools=pools)
    except Exception as error:  # a sweep goes on with its other trials
        refused = isinstance(error, InputError) and not RunFolder(target).config_file.exists()
        reason, code = described(error)
        status = "incompatible" if refused else "failed"
        return _ended(log, replace(trial, status=status, reason=reason, exit_code=code)), None, error
    finally:
        remove_if_empty(target)
    return _ended(log, replace(trial, status="kept" if kept else "finished")), summary, None


def _ended(log: TrialLog, trial: Trial) -> Trial:
    log.add(trial)
    return trial


def _free(folder: Path) -> Path:
    """``folder``, or the first number from its own on that is no run's."""
    first = int(folder.name) if folder.name.isdigit() else 0
    places = chain([folder], (folder.parent / str(number) for number in count(first)))
    return next(place for place in places if not RunFolder(place).config_file.exists())


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that Hydra has made and nothing has come to."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _has_several(override: Override) -> bool:
    """Whether it is swept, and not the only value that :func:`simulations.compose.in_every_trial` gives all trials."""
    only = override.is_choice_sweep() and len(list(override.sweep_iterator())) == 1
    return override.is_sweep_override() and not only


class SweepStart(Callback):
    """Told by Hydra where the trials of a sweep will be, whatever launches them.

    Attributes:
        log: of the sweep that was started last in this process.
        skip: how many lines it had before.
        swept: the settings that have several values.
        tuning: ``tuning`` of the configuration; ``None``: an ordinary sweep.
    """

    log: ClassVar[TrialLog | None] = None
    skip: ClassVar[int] = 0
    swept: ClassVar[frozenset[str]] = frozenset()
    tuning: ClassVar[Any] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the sweep's folder, and what is swept; the parts of a tuned sweep are one."""
        if SweepStart.log is not None:
            return
        SweepStart.log, SweepStart.tuning = TrialLog(Path(config.hydra.sweep.dir)), config.tuning
        SweepStart.skip = len(SweepStart.log.read())
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        several = {override.key_or_group for override in given if _has_several(override)}
        SweepStart.swept = frozenset(several | set(config.hydra.sweeper.params or ()))

    @classmethod
    def name_of(cls, trial: Trial, but: str = "") -> str:
        """What sets ``trial`` apart from the others of its sweep, such as ``method=ffa seed=2``; ``but``: a setting."""
        pairs = [(o.partition("=")[0].lstrip("+"), o) for o in trial.overrides]
        return " ".join(override for key, override in pairs if key in cls.swept and key != but)

    @classmethod
    def outcomes(cls, skip: int = 0) -> list[Trial]:
        """What became of every trial of this sweep (of those after ``skip`` lines), in the order of their starts."""
        lines = cls.log.read(cls.skip + skip) if cls.log else []
        return list({trial.config: trial for trial in lines}.values())
