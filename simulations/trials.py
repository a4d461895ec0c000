"""``trials.jsonl``: a line for every start and every end of a trial, with a hash of its configuration."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fedlora import __version__
from fedlora.config import Config
from simulations.run_folder import RunFolder

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
    """A hash of everything that a run is asked for but its folder and its tracker, and of the version of fedlora."""
    text = __version__ + config.model_dump_json(exclude={"run_dir", "tracking"})
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class TrialLog:
    """``trials.jsonl`` of the sweep in ``path``."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path / FILE

    def add(self, trial: Trial) -> None:
        """Append a line, in one write: several processes may do so at once."""
        self.path.mkdir(parents=True, exist_ok=True)
        cut_short = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        line = ("\n" if cut_short else "") + json.dumps(asdict(trial)) + "\n"
        file = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self, skip: int = 0) -> list[Trial]:
        """All trials but the first ``skip``; a line cut short by a crash is left out."""
        trials = []
        for line in self.file.read_text().split("\n") if self.file.exists() else []:
            try:
                trials.append(Trial(**json.loads(line)))
            except json.JSONDecodeError:
                continue
        return trials[skip:]

    def folder_of(self, config: str) -> str | None:
        """Where a trial of this configuration is or was run, if that folder is still there."""
        names = [trial.folder for trial in self.read() if trial.config == config]
        return next((name for name in names[::-1] if RunFolder(self.path / name).config_file.exists()), None)
