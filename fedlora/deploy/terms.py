"""What server and client must agree on before anything is trained: sent by the server, compared field by field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord
from torch import Tensor

from fedlora import __version__
from fedlora.client import Worker
from fedlora.config import Config
from fedlora.errors import FedloraError

TERMS = "terms"
"""The record of a message in which the server says its terms, and of the reply in which a client says its own."""
WIRE_VERSION = 1
COMPARED = ("package", "wire", "backbone", "tokenizer", "labels", "manifest")


@dataclass(frozen=True)
class Terms:
    """What is agreed on.

    Attributes:
        run: id of the run, the same after it was resumed.
        config: the resolved configuration as JSON, without what each side has for itself.
        clients: everyone who trains, where the adapter or the clients' capabilities depend on it.
        labels: the global label schema, in the order of the numbers.
        package: version of fedlora.
        wire: version of the wire format.
        backbone: hash of every frozen weight as it is computed with.
        tokenizer: hash of the tokenizer.
        manifest: hash of names, shapes and number formats of all that travels, and of what the adapter starts from.
    """

    run: str
    config: str
    clients: tuple[str, ...]
    labels: tuple[str, ...]
    package: str
    wire: int
    backbone: str
    tokenizer: str
    manifest: str

    @property
    def fingerprint(self) -> str:
        """Names everything that is agreed on but the run: a client's policy can allow a list of these."""
        values = {key: value for key, value in asdict(self).items() if key != "run"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def record(self) -> ConfigRecord:
        """As a record of a message."""
        return ConfigRecord({key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()})

    @classmethod
    def from_record(cls, record: Any) -> Terms:
        """Read a record of a message.

        Raises:
            FedloraError: a field is missing, unknown or of another type.
        """
        kinds = {"wire": int, "clients": list, "labels": list}
        if not isinstance(record, ConfigRecord) or set(record) != {field.name for field in fields(cls)}:
            raise FedloraError("the terms of the run are incomplete: server and client have different versions")
        values: dict[str, Any] = dict(record)
        for name, value in values.items():
            if type(value) is not kinds.get(name, str) or (type(value) is list and {type(v) for v in value} - {str}):
                raise FedloraError(f"the terms of the run are not valid: '{name}' is {value!r:.80}")
        settled: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**settled)

    def differing(self, own: Terms) -> str | None:
        """The first field in which ``own`` differs, and both values; ``None`` if none does."""
        for name in COMPARED:
            theirs, ours = getattr(self, name), getattr(own, name)
            if theirs != ours:
                return f"'{name}' differs: the server has {_short(theirs)} and the client {_short(ours)}"
        return None


def terms_of(worker: Worker, run: str, config: str | None = None, clients: Iterable[str] = ()) -> Terms:
    """What ``worker`` would agree to.

    Args:
        worker: of the server, or of a client with its own rows.
        run: id of the run.
        config: as the server said it; ``None``: this is the server.
        clients: as the server said them.
    """
    federation, model = worker.federation, worker.model
    needs_clients = federation.adapter.needs_clients or bool(federation.differences)
    named = tuple(clients) if config is not None else (federation.clients if needs_clients else ())
    start = {**worker.initial, **worker.seeded_frozen}
    shapes = [federation.config.wire.dtype, sorted(worker.layout("").items())]
    return Terms(
        run=run,
        config=common_config(federation.config) if config is None else config,
        clients=named,
        labels=federation.schema.labels,
        package=__version__,
        wire=WIRE_VERSION,
        backbone=hash_of(model.backbone_tensors()),
        tokenizer=_tokenizer_hash(worker),
        manifest=hashlib.sha256(f"{shapes}{hash_of(start)}".encode()).hexdigest(),
    )


def common_config(config: Config) -> str:
    """The configuration as JSON, with the server's own paths and names left out."""
    values = config.model_dump(mode="json")
    values["privacy"]["secret"] = None
    values["data"] |= {"path": None, "client": None, "group": None}
    if values["backbone"]["path"] and Path(values["backbone"]["path"]).exists():
        values["backbone"]["path"] = None
    return json.dumps({**values, "run_dir": "", "tracking": {"name": "none"}}, sort_keys=True)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, number formats and bits, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tokenizer_hash(worker: Worker) -> str:
    backbone = worker.federation.backbone
    if not backbone.has_tokenizer:
        return ""
    tokenizer = backbone.tokenizer()
    fast = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(sorted(tokenizer.get_vocab().items()))
    if fast is not None:
        settled = json.loads(fast.to_str()) | {"truncation": None, "padding": None}  # as each last call has set them
        content = json.dumps(settled, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _short(value: object) -> str:
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return f"'{text if len(text) <= 60 else text[:16] + '...'}'"
