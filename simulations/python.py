"""fedlora from Python: ``from fedlora import simulate``.

>>> from fedlora import simulate
>>> result = simulate("method=fed_sb", "rounds=5", run_dir="runs/first")
>>> result.rounds[["round", "loss", "validation_accuracy"]]
>>> result.plot("curve-bytes").show()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fedlora.errors import InputError
from simulations.callbacks import Callback
from simulations.compose import compose_config
from simulations.run_folder import RunFolder
from simulations.simulate import start


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder.
    """

    folder: Path

    def __post_init__(self) -> None:
        """Refuse a folder without a finished run."""
        if not RunFolder(self.folder).summary_file.exists():
            raise InputError(f"{self.folder} holds no finished run: it has no summary.json. 'fedlora resume' ends one.")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``: method, seed, ``final`` and ``best`` metrics, totals, versions."""
        return RunFolder(self.folder).read_summary() or {}

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """One row a round: ``rounds.jsonl`` with its metrics as columns, ``clients.mean``, ``seconds.train``, ..."""
        records = [{**record, **record["metrics"]} for record in RunFolder(self.folder).read_rounds()]
        frame = pd.json_normalize([{k: v for k, v in record.items() if k != "metrics"} for record in records])
        return frame.drop(columns=[name for name in frame if name.startswith("failures.")])

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """One row a message: round, client, direction, payload, setup and message bytes, status."""
        return pd.read_parquet(RunFolder(self.folder).ledger_file)

    def plot(self, figure: str = "curve-rounds") -> Any:
        """A figure of the report as a plotly ``Figure``; ``.show()`` it, or ``.write_html(...)``.

        Args:
            figure: its name in :meth:`simulations.report.Report.figures`.

        Raises:
            InputError: there is no such figure, or this run has no numbers for it.
        """
        from simulations.report import Report

        figures = Report.of(self.folder).figures()
        if figure not in figures:
            raise InputError(f"figure '{figure}' is not there for this run. It has: {', '.join(figures)}.")
        return figures[figure]


def simulate(
    *overrides: str, run_dir: str | Path | None = None, merged: bool = False, callbacks: Sequence[Callback] = ()
) -> Result:
    """Run one configuration, as ``fedlora simulate`` does.

    Args:
        overrides: settings such as ``"method=fed_sb"`` or ``"client.lr=1e-3"``.
        run_dir: the run folder, which may not hold a run yet; by default ``runs/<date and time>``.
        merged: whether the whole model with the adapter merged in is written, too.
        callbacks: told of every round.

    Raises:
        InputError: the settings or the data cannot work; nothing is left behind then.
        FedloraError: the run failed.
    """
    config = compose_config([*overrides, *([] if run_dir is None else [f"run_dir={run_dir}"])])
    folder = Path(config.run_dir)
    start(config, folder, merged=merged, callbacks=callbacks)
    return Result(folder)
