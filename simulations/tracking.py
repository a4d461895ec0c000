"""Experiment trackers: what ``rounds.jsonl`` says, told to TensorBoard, Weights & Biases, MLflow and others.

The trackers are those of accelerate (``accelerate.tracking``), or a class of one's own with the same three methods.
"""

from __future__ import annotations

import logging
import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from fedlora.config import Config, nearest
from fedlora.errors import InputError
from fedlora.ledger import TOTALS
from fedlora.plugins import is_plugin_path, load_object
from simulations.callbacks import Callback
from simulations.run_folder import RunFolder
from simulations.trials import TrialLog

NOTICES = logging.getLogger("fedlora.notices")
PACKAGES = {"comet_ml": "comet-ml"}


class Tracking(Callback):
    """One tracker of one run; it starts with the first round that is written down."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Find the tracker that ``tracking.name`` asks for.

        Raises:
            InputError: there is none of that name, or its package is missing.
        """
        self.config, self.folder = config, folder
        self.make = tracker_class(config.tracking.name)
        self._tracker: Any = None
        self._label, self._completed, self._bytes, self._broken = "", 0, 0, False

    def on_start(self, label: str, rounds: int, completed: int) -> None:
        """Note the name of the run, from which round it goes on, and what it has sent before."""
        self._label, self._completed = label, completed
        self._bytes = sum(r["message_up"] + r["message_down"] for r in RunFolder(self.folder).read_rounds())

    def on_round_end(self, record: Mapping[str, Any]) -> None:
        """Log every number of the round; its step is the round."""
        self._bytes += record["message_up"] + record["message_down"]
        self._log({**numbers_of(record), "bytes/run": self._bytes}, record["round"])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Log the best validation values under ``best/``, if there are validation rows."""
        found = (summary["best"] or {"metrics": {}})["metrics"]
        self._log({f"best/{name}": value for name, value in found.items()}, summary["rounds"])

    def close(self) -> None:
        """Finish the tracker's run, also that of a run that has failed."""
        if self._tracker is not None and not self._broken:
            with self._forgiving():
                self._tracker.finish()
        self._tracker = None

    def _log(self, values: dict[str, float], step: int) -> None:
        if not self._broken:
            with self._forgiving():
                if self._tracker is None:
                    self._tracker = self._started()
                self._tracker.log(values, step=step)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """A tracker that cannot be reached costs what it would have shown, and no run."""
        try:
            yield
        except Exception as error:  # whatever a tracker's package raises
            self._broken = True
            NOTICES.warning("tracking=%s stops, the run goes on: %s", self.config.tracking.name, error)

    def _started(self) -> Any:
        PartialState()  # accelerate asks it which process may log
        tracker = self.make(**self._options())
        tracker.start()
        if self.config.tracking.name == "tensorboard":  # which would make a folder of its own for every configuration
            text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
            tracker.log({"configuration": "\n".join(f"    {line}" for line in text.splitlines())}, step=0)
        else:
            tracker.store_init_configuration(dict(flat(self.config.model_dump(mode="json"))))
        return tracker

    def _options(self) -> dict[str, Any]:
        """What the tracker is made with: ``tracking.settings``, and where and under which names it logs."""
        settings, name = self.config.tracking, f"{self._label} seed {self.config.seed}"
        sweep = self.folder.parent.name if TrialLog(self.folder.parent).file.exists() else None
        usual: dict[str, Any] = {"run_name": settings.project}
        if settings.name == "tensorboard":
            usual = {"run_name": "", "logging_dir": self.folder / "tensorboard"}
            if usual["logging_dir"].exists():  # what was logged after the checkpoint is logged again
                usual["purge_step"] = self._completed + 1
        elif settings.name == "wandb":
            usual |= {"name": name, "group": sweep, "dir": str(self.folder)}
        elif settings.name == "mlflow":
            tags = {"mlflow.parentRunId": _parent_in_mlflow(settings.project, self.folder.parent)} if sweep else None
            usual = {"experiment_name": settings.project, "run_name": name, "tags": tags}
        elif getattr(self.make, "requires_logging_directory", False):
            usual["logging_dir"] = self.folder / settings.name
        return usual | settings.settings


def _parent_in_mlflow(project: str, sweep: Path) -> str:
    """The run of MLflow that those of a sweep are nested in; its id is kept in the sweep's folder."""
    file = sweep / "mlflow_parent"
    if not file.exists():
        import mlflow  # pyright: ignore[reportMissingImports]

        client = mlflow.MlflowClient()
        known = client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else client.create_experiment(project)
        parent = client.create_run(experiment, run_name=sweep.name).info.run_id
        client.set_terminated(parent)
        file.write_text(parent)
    return file.read_text()


def tracker_class(name: str) -> type[GeneralTracker]:
    """The tracker called ``name``, or the class at an import or file path.

    Raises:
        InputError: there is none, or its package is missing.
    """
    if is_plugin_path(name):
        return load_object(name, "tracking.name")
    if name not in LOGGER_TYPE_TO_CLASS:
        known = sorted(LOGGER_TYPE_TO_CLASS)
        raise InputError(
            f"tracking.name = '{name}' is not known.{nearest(name, known)} Known: none, {', '.join(known)}; or a class "
            "of your own, such as ./mine.py:Tracker."
        )
    if LoggerType(name) not in get_available_trackers():
        raise InputError(
            f"tracking={name} needs the package {PACKAGES.get(name, name)}, which is not installed: run 'pip install "
            f"{PACKAGES.get(name, name)}', or use tracking=tensorboard or tracking=none."
        )
    return LOGGER_TYPE_TO_CLASS[name]


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a line of ``rounds.jsonl`` by a path of two parts: ``metrics/test_accuracy``, ``bytes/setup``."""
    found: dict[str, float] = {"failures": len(record["failures"]), "cohort": len(record["cohort"] or ())}
    for key, value in record.items():
        if key in TOTALS:
            found[f"bytes/{key.removesuffix('_bytes')}"] = value
        elif isinstance(value, Mapping) and key != "failures":
            found |= {f"{key}/{name}": float(v) for name, v in value.items() if isinstance(v, numbers.Real)}
        elif isinstance(value, numbers.Real) and key != "round":
            found[key] = float(value)
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping as ``("client.lr", 0.003)``; lists as text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str | int | float | None) else str(value)
