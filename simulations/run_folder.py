"""The run folder: the files that a run leaves behind. A folder without ``summary.json`` is unfinished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from safetensors.torch import save_file
from torch import Tensor

from fedlora.config import Config, load_config
from fedlora.errors import InputError
from fedlora.store import ClientStore, write_atomically


class RunFolder:
    """Paths of one run, and the reading and writing of its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.config_file = self.path / "config.yaml"
        self.summary_file = self.path / "summary.json"
        self.rounds_file = self.path / "rounds.jsonl"
        self.ledger_file = self.path / "ledger.parquet"
        self.clients_file = self.path / "clients.parquet"
        self.log_file = self.path / "log.txt"
        self.checkpoint = self.path / "checkpoint"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.store = ClientStore(self.path / "clients")

    def require_new(self) -> None:
        """Refuse to write over a run.

        Raises:
            InputError: a run is there already.
        """
        if self.config_file.exists():
            state = "a finished" if self.summary_file.exists() else "an unfinished"
            raise InputError(
                f"run_dir = {self.path} already holds {state} run. Continue it with 'fedlora resume {self.path}', "
                "or choose another run_dir."
            )

    def create(self, config: Config) -> None:
        """Make a new run folder.

        Raises:
            InputError: a run is there already.
        """
        self.require_new()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(config)

    def change_engine(self, **values: Any) -> None:
        """Write down what of the engine had to change during the run; a resumed run starts with it."""
        config = self.read_config()
        self._write(config.model_copy(update={"engine": config.engine.model_copy(update=values)}))

    def _write(self, config: Config) -> None:
        write_atomically(self.config_file, yaml.safe_dump(config.model_dump(), sort_keys=False))

    def read_config(self) -> Config:
        """The resolved configuration of the run.

        Raises:
            InputError: there is no run here.
        """
        if not self.config_file.exists():
            raise InputError(f"{self.path} is not a run folder: it has no config.yaml.")
        return load_config(yaml.safe_load(self.config_file.read_text()))

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, or ``None`` while the run is unfinished."""
        return json.loads(self.summary_file.read_text()) if self.summary_file.exists() else None

    def write_clients(self, each: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """Write ``clients.parquet``: a row a client of the newest evaluation, if any client is evaluated.

        Args:
            each: ``{kind: {client: {name: value}}}``, as an evaluation has it.
        """
        found = [
            {"kind": kind, "client": client, **values}
            for kind, clients in each.items()
            for client, values in clients.items()
        ]
        if not found:
            return
        temporary = self.clients_file.with_name(f".{self.clients_file.name}.{os.getpid()}.tmp")
        pd.DataFrame(found).to_parquet(temporary, index=False)
        temporary.replace(self.clients_file)

    def append_round(self, record: Mapping[str, Any]) -> None:
        """Add one line to ``rounds.jsonl``."""
        with self.rounds_file.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def read_rounds(self) -> list[dict[str, Any]]:
        """All rounds so far; a last line cut short by a crash is ignored."""
        if not self.rounds_file.exists():
            return []
        rounds = []
        for line in self.rounds_file.read_text().splitlines():
            try:
                rounds.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rounds

    def truncate_rounds(self, last_round: int) -> None:
        """Forget rounds after ``last_round``."""
        kept = [record for record in self.read_rounds() if record["round"] <= last_round]
        write_atomically(self.rounds_file, "".join(json.dumps(record) + "\n" for record in kept))


def write_tensors_atomically(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is either whole or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(dict(tensors), temporary)
    temporary.replace(path)
