"""A deployed client: agrees to the terms of a run, then trains on its own rows whatever process asks it to.

Everything it keeps lies in its home folder, by run; its process may end at any time, or be another one for every
message, as Flower's own SuperNode has it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.client import Worker
from fedlora.config import Config, EngineConfig
from fedlora.deploy.datasets import client_dataset, own_data
from fedlora.deploy.terms import TERMS, Terms, terms_of
from fedlora.errors import FedloraError, InputError
from fedlora.federation import Federation, task_of
from fedlora.grid import error_reply
from fedlora.store import ClientStore, write_atomically
from fedlora.tasks import Schema

log = logging.getLogger("fedlora")
IDENTITY = "client"
"""The record in which a client says who it is, beside its terms."""


@dataclass(frozen=True)
class Home:
    """What a data owner gives its client.

    Attributes:
        folder: where the client keeps what it must not forget.
        client: its id, the same in every run.
        data: the file of its rows.
        columns: settings of ``data`` that are different here than in the run, such as ``{"text": "review"}``.
        backbone: where the weights are on this machine; ``None``: where the run's configuration says.
    """

    folder: Path
    client: str
    data: str
    columns: Mapping[str, str | None] = field(default_factory=dict)
    backbone: str | None = None

    def folder_of(self, run: str) -> Path:
        """Where everything of one run lies."""
        return self.folder / "runs" / "".join(letter for letter in run if letter.isalnum() or letter in "-_")


class DeployedClient:
    """Answers the messages of any number of runs, each with a model and a store of its own."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._workers: dict[int, Worker] = {}

    def handle(self, message: Message) -> Message:
        """Answer ``message``; what goes wrong becomes an error reply that says why, and costs nothing else."""
        try:
            if TERMS in message.content:
                return self._agree(message)
            return self._worker(message.metadata.run_id).handle(message)
        except FedloraError as error:
            log.warning("%s", error)
            return error_reply(message, str(error))
        except Exception as error:  # its text may hold something of the rows, and stays here
            log.exception("a message could not be answered")
            return error_reply(message, f"{type(error).__name__}; the client's own log says more")

    def _agree(self, message: Message) -> Message:
        """Compare terms, remember those of the run, and say who this is; or why it does not take part."""
        identity = ConfigRecord({"client-id": self.home.client})
        reply = RecordDict({IDENTITY: identity})
        try:
            said = Terms.from_record(message.content[TERMS])
            worker = self._build(said)
            own = terms_of(worker, said.run, said.config, said.clients)
            difference = said.differing(own)
            if difference is not None:
                raise FedloraError(f"the terms of the run: {difference}")
        except FedloraError as error:
            log.warning("run refused: %s", error)
            identity["refused"] = str(error)
            return Message(reply, reply_to=message)
        self._workers = {message.metadata.run_id: worker}
        self.home.folder_of(said.run).mkdir(parents=True, exist_ok=True)
        write_atomically(self._session(message.metadata.run_id), json.dumps(dict(said.record())))
        log.info("joined run %s, terms %s", said.run, said.fingerprint)
        reply[TERMS] = own.record()
        return Message(reply, reply_to=message)

    def _session(self, run_id: int) -> Path:
        """Where the terms of Flower's run of this number are; a run of ours that is resumed has a new number."""
        return self.home.folder / f"session-{run_id:x}.json"

    def _worker(self, run_id: int) -> Worker:
        if run_id not in self._workers:
            path = self._session(run_id)
            if not path.exists():
                raise FedloraError("this client has not agreed to the terms of this run, and does nothing for it")
            self._workers = {run_id: self._build(Terms.from_record(ConfigRecord(json.loads(path.read_text()))))}
        return self._workers[run_id]

    def _build(self, terms: Terms) -> Worker:
        """A worker for a run, with the rows of this client alone and randomness from its own machine."""
        folder = self.home.folder_of(terms.run)
        values: dict[str, Any] = json.loads(terms.config)
        config = Config.model_validate(values)
        backbone = config.backbone.model_copy(update={"path": self.home.backbone or config.backbone.path})
        data = own_data(config, Schema(terms.labels), self.home.data, **self.home.columns)
        engine = EngineConfig(name="loop", workers=0, packing=config.engine.packing)
        update = {"backbone": backbone, "data": data, "engine": engine, "run_dir": str(folder)}
        config = config.model_copy(update=update)
        try:
            dataset = client_dataset(config, task_of(config), self.home.client, data, terms.clients)
        except InputError as error:  # its text may hold something of the rows, and stays here
            log.error("%s", error)
            raise FedloraError("its rows do not suit the run; the client's own log says why") from error
        return Worker(Federation(config, dataset), ClientStore(folder / "clients"), deployed=True)
