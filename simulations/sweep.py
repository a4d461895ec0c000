"""The trials of a sweep: each is run once, whatever becomes of the others, and the sweep's folder remembers which.

``trials.jsonl`` has a line for every start and every end of a trial, with a hash of its configuration. A sweep that is
repeated into the same folder keeps what is finished and resumes what was interrupted. Launchers may run trials in
processes of their own, so this file is all that trials and the command that started them have in common.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fedlora import __version__
from fedlora.config import Config
from fedlora.errors import InputError
from simulations.compose import to_config
from simulations.engines.pool import Pools
from simulations.messages import described
from simulations.run_folder import RunFolder
from simulations.simulate import resume, start

FILE = "trials.jsonl"
Status = Literal["started", "finished", "kept", "incompatible", "failed"]


@dataclass(frozen=True)
class Trial:
    """One line of ``trials.jsonl``.

    Attributes:
        overrides: what it was given, such as ``["method=ffa", "seed=2"]``.
        config: hash of the configuration (:func:`fingerprint`), or the overrides where they give none.
        folder: its run folder, inside that of the sweep.
        status: ``kept``: finished by an earlier sweep; ``incompatible``: refused before anything was written.
        reason: of a trial that left no result.
        exit_code: 0, or what ``fedlora`` returns for that reason.
    """

    overrides: list[str]
    config: str
    folder: str
    status: Status
    reason: str | None = None
    exit_code: int = 0


def fingerprint(config: Config) -> str:
    """A hash of everything that a run is asked for but its folder, and of the version of fedlora."""
    text = __version__ + config.model_dump_json(exclude={"run_dir"})
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class TrialLog:
    """``trials.jsonl`` of the sweep in ``path``."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path / FILE

    def add(self, trial: Trial) -> None:
        """Append a line, in one write: several processes may do so at once."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(trial)) + "\n"
        file = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self, skip: int = 0) -> list[Trial]:
        """All lines but the first ``skip``; one cut short by a crash is left out."""
        lines = self.file.read_text().splitlines()[skip:] if self.file.exists() else []
        return [Trial(**json.loads(line)) for line in lines if line.endswith("}")]

    def folder_of(self, config: str) -> str | None:
        """Where a trial of this configuration is or was run, if that folder is still there."""
        names = [trial.folder for trial in self.read() if trial.config == config]
        return next((name for name in names[::-1] if RunFolder(self.path / name).config_file.exists()), None)


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


def names_of(trials: Sequence[Trial]) -> list[str]:
    """What sets each trial apart from the others, beside the method: the overrides that not all of them have."""
    common = set.intersection(*(set(trial.overrides) for trial in trials)) if trials else set()
    return [" ".join(o for o in trial.overrides if o not in common and not o.startswith("method=")) for trial in trials]


class SweepStart(Callback):
    """Told by Hydra where the trials of a sweep will be, whatever launches them.

    Attributes:
        log: of the sweep that was started last in this process.
        skip: how many lines it had before.
        swept: the settings that have several values.
    """

    log: ClassVar[TrialLog | None] = None
    skip: ClassVar[int] = 0
    swept: ClassVar[frozenset[str]] = frozenset()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the sweep's folder."""
        SweepStart.log = TrialLog(Path(config.hydra.sweep.dir))
        SweepStart.skip = len(SweepStart.log.read())
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        several = {override.key_or_group for override in given if override.is_sweep_override()}
        SweepStart.swept = frozenset(several | set(config.hydra.sweeper.params or ()))

    @classmethod
    def name_of(cls, trial: Trial, but: str = "") -> str:
        """What sets ``trial`` apart from the others of its sweep, such as ``method=ffa seed=2``; ``but``: a setting."""
        pairs = [(o.partition("=")[0].lstrip("+"), o) for o in trial.overrides]
        return " ".join(override for key, override in pairs if key in cls.swept and key != but)

    @classmethod
    def outcomes(cls) -> list[Trial]:
        """What became of every trial of this sweep, in the order in which they were started."""
        lines = cls.log.read(cls.skip) if cls.log else []
        return list({trial.config: trial for trial in lines}.values())
