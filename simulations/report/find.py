"""Where runs are: run folders, folders of sweeps, patterns, and which runs of a tuned sweep count."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import InputError
from simulations.tuning import FILE


@dataclass(frozen=True)
class TunedSweep:
    """What a report needs of ``comparison.json``.

    Attributes:
        setting: what was tuned, such as ``client.lr``.
        methods: what is known of the method, for every run folder of the final part.
    """

    setting: str
    methods: dict[Path, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> TunedSweep:
        """The tuned sweep in ``folder``.

        Raises:
            InputError: its ``comparison.json`` is damaged, or does not name the runs of the final part.
        """
        file, again = folder / FILE, "Repeat the command of the sweep: it keeps what is finished and writes the file."
        try:
            document = json.loads(file.read_text())
            if any("folders" not in method for method in document["methods"]):
                raise InputError(f"'{file}' is of an older version and does not name its final runs. {again}")
            methods = {
                folder / name: {key: method[key] for key in ("value", "curve", "at_the_edge")}
                for method in document["methods"]
                for name in method["folders"]
            }
            return cls(str(document["setting"]), methods)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"'{file}' cannot be read ({type(error).__name__}: {reason}). {again}") from error


def tuned_sweeps(folders: Iterable[Path]) -> dict[Path, TunedSweep]:
    """The tuned sweeps that run folders are in, by the folder of the sweep.

    Raises:
        InputError: one of them cannot be read.
    """
    places = dict.fromkeys(folder.parent for folder in folders)
    return {place: TunedSweep.read(place) for place in places if (place / FILE).exists()}


def find(paths: Iterable[str | Path]) -> list[Path]:
    """All run folders (those with a ``config.yaml``), in natural order of their names, each once.

    Raises:
        InputError: a path does not exist, cannot be read, or holds no run.
    """
    found: dict[Path, None] = {}
    for path in map(str, paths):
        places = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True), key=_natural)
        if not places:
            raise InputError(f"There is no run at '{path}'. Give run folders, folders of sweeps or a pattern.")
        folders = [folder for place in places for folder in _inside(Path(place))]
        if not folders:
            raise InputError(
                f"'{path}' holds no run: no folder in it has a config.yaml. 'fedlora simulate run_dir=...' makes one."
            )
        found |= dict.fromkeys(folders)
    if not found:
        raise InputError("No runs are given. Name run folders, folders of sweeps or a pattern.")
    return list(found)


def _inside(place: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"'{error.filename}' cannot be read: {error.strerror}. Mend its permissions or name its runs.")

    folders = []
    for folder, below, files in os.walk(place, onerror=refuse):
        below.sort(key=_natural)
        if "config.yaml" in files:
            folders.append(Path(folder).resolve())
            below.clear()
    return folders


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
