"""What a client keeps between rounds, on disk, keyed by client id.

One small file a client and round. A client in round t reads the newest file older than t, so a round that is run
again after a crash starts from the same state and overwrites its own files: nothing has to be rolled back. Tensors
that many simulated clients hold alike (a basis, a base correction) are stored once, under a key of their content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARED = "_shared"
OPTIMIZER = "optimizer/"


@dataclass(frozen=True)
class ClientRecord:
    """State of one client after a round.

    Attributes:
        private: tensors that never leave the client.
        references: names of shared content it holds, such as ``{"setup": key}``.
        optimizer: moments of its optimiser, where they are kept from round to round.
    """

    private: Mapping[str, Tensor] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)


class ClientStore:
    """The folder ``clients/`` of a run, or one client's own folder in a deployment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, client: str, server_round: int) -> ClientRecord:
        """State of ``client`` as it was before ``server_round`` (empty if it has none)."""
        newest = self._newest(client, server_round)
        if newest is None:
            return ClientRecord()
        with safe_open(newest, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        kept = {key: value for key, value in tensors.items() if key.startswith(OPTIMIZER)}
        private = {key: value for key, value in tensors.items() if key not in kept}
        optimizer = {key.removeprefix(OPTIMIZER): value for key, value in kept.items()}
        return ClientRecord(private, json.loads(metadata["references"]), optimizer)

    def references(self, client: str, server_round: int) -> dict[str, str]:
        """What :meth:`read` says of shared content, without reading the client's own tensors."""
        newest = self._newest(client, server_round)
        if newest is None:
            return {}
        with safe_open(newest, framework="pt") as file:
            return json.loads((file.metadata() or {})["references"])

    def write(self, client: str, server_round: int, record: ClientRecord) -> None:
        """Store the state of ``client`` after ``server_round``, atomically."""
        path = self._path(client, server_round)
        metadata = {"references": json.dumps(dict(record.references)), "client": client}
        tensors = {**record.private, **{OPTIMIZER + key: value for key, value in record.optimizer.items()}}
        _save(path, {key: value.contiguous() for key, value in tensors.items()}, metadata)

    def put_shared(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store content that any number of clients refer to by ``key``."""
        path = self.folder / SHARED / f"{key}.safetensors"
        if not path.exists():
            _save(path, {name: value.contiguous() for name, value in tensors.items()}, {})

    def get_shared(self, key: str) -> dict[str, Tensor]:
        """Read shared content."""
        return load_file(self.folder / SHARED / f"{key}.safetensors")

    def has_shared(self, key: str) -> bool:
        """Whether content of this key is stored."""
        return (self.folder / SHARED / f"{key}.safetensors").exists()

    def clients(self) -> list[str]:
        """Clients that have state, by folder order."""
        found = []
        for folder in sorted(self.folder.glob("*")):
            files = sorted(folder.glob("round_*.safetensors"))
            if folder.name != SHARED and files:
                with safe_open(files[-1], framework="pt") as file:
                    found.append((file.metadata() or {})["client"])
        return found

    def prune(self, client: str, completed_round: int) -> None:
        """Drop states of ``client`` that no resume from ``completed_round`` or later can read."""
        rounds = self._rounds(client)
        keep_from = max((r for r in rounds if r <= completed_round), default=0)
        for r in rounds:
            if r < keep_from:
                self._path(client, r).unlink()

    def remove(self, client: str) -> None:
        """Drop everything that ``client`` keeps, and shared content that only it referred to."""
        shutil.rmtree(self.folder_of(client), ignore_errors=True)
        self.collect()

    def collect(self) -> None:
        """Drop shared content that no client refers to any more."""
        referenced: set[str] = set()
        for path in self.folder.glob("[!_]*/round_*.safetensors"):
            with safe_open(path, framework="pt") as file:
                referenced.update(json.loads((file.metadata() or {})["references"]).values())
        for path in (self.folder / SHARED).glob("*.safetensors"):
            if path.stem not in referenced:
                path.unlink()

    def folder_of(self, client: str) -> Path:
        """Where everything that is ``client``'s own lies."""
        return self.folder / folder_name(client)

    def _path(self, client: str, server_round: int) -> Path:
        return self.folder_of(client) / f"round_{server_round:06d}.safetensors"

    def _newest(self, client: str, server_round: int) -> Path | None:
        """The file of ``client`` from the last round before ``server_round``."""
        newest = max((r for r in self._rounds(client) if r < server_round), default=None)
        return None if newest is None else self._path(client, newest)

    def _rounds(self, client: str) -> list[int]:
        folder = self.folder_of(client)
        return [int(path.stem.removeprefix("round_")) for path in folder.glob("round_*.safetensors")]


def folder_name(client: str) -> str:
    """A readable folder name that no two client ids share, whatever characters they hold."""
    name = quote(client, safe=" ,()&'!")
    if name == client and 0 < len(name) <= 80 and name[0] not in "._ " and "~" not in name:
        return name
    return f"{name[:60].lstrip('._ ')}~{hashlib.blake2b(client.encode(), digest_size=6).hexdigest()}"


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or as it was; when this returns, it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata)
    temporary.replace(path)
