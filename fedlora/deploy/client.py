"""A deployed client: agrees to the terms of a run, then trains on its own rows whatever process asks it to.

Everything it keeps lies in its home folder, by run; its process may end at any time, or be another one for every
message, as Flower's own SuperNode has it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.client import Worker, asks_for_training
from fedlora.config import EngineConfig, load_config
from fedlora.deploy.datasets import client_dataset, own_data
from fedlora.deploy.guard import Guard
from fedlora.deploy.policy import Policy
from fedlora.deploy.terms import TERMS, Terms, terms_of
from fedlora.errors import FedloraError, InputError, PolicyError
from fedlora.federation import Federation, task_of
from fedlora.grid import error_reply
from fedlora.store import ClientStore, write_atomically
from fedlora.tasks import Schema
from fedlora.validation import asks_for_gradients, instructions

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
        policy: what the owner allows.
    """

    folder: Path
    client: str
    data: str
    columns: Mapping[str, str | None] = field(default_factory=dict)
    backbone: str | None = None
    policy: Policy = field(default_factory=Policy)

    def folder_of(self, run: str) -> Path:
        """Where everything of one run lies."""
        return self.folder / "runs" / "".join(letter for letter in run if letter.isalnum() or letter in "-_")


class DeployedClient:
    """Answers the messages of any number of runs, each with a model and a store of its own."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.guard = Guard(home.folder, home.policy)
        self._sessions: dict[int, tuple[str, Worker]] = {}

    def handle(self, message: Message) -> Message:
        """Answer ``message``; what goes wrong becomes an error reply that says why, and costs nothing else."""
        run = f"session {message.metadata.run_id:x}"
        try:
            if TERMS in message.content:
                return self._agree(message)
            run, worker = self._session(message.metadata.run_id)
            self.guard.received(run, message)
            self._admit(run, worker, message)
            return self.guard.answered(run, worker.handle(message))
        except FedloraError as error:
            log.warning("%s", error)
            reason = str(error)
        except Exception as error:  # its text may hold something of the rows, and stays here
            log.exception("a message could not be answered")
            reason = f"{type(error).__name__}; the client's own log says more"
        return self.guard.refused(run, reason, error_reply(message, reason))

    def _admit(self, run: str, worker: Worker, message: Message) -> None:
        """See whether a message asks for something that the owner allows, before any of it is done."""
        train = worker.federation.index.train
        asked, client = instructions(message, train), self.home.client
        if (asked["client-id"], *asked.get("pool", ())) not in ((client,), (client, client)):
            raise PolicyError(f"this is client '{client}', which trains for nobody else")
        if asks_for_gradients(message):
            if not worker.federation.adapter.needs_client_gradients:
                raise PolicyError("the server asks for gradients of rows, which this run has no use for")
            self.guard.admit_gradients(run)
        elif asks_for_training(message):
            self.guard.admit_training(run, worker.federation.config, len(train[client]), asked)

    def _agree(self, message: Message) -> Message:
        """Compare terms, remember those of the run, and say who this is; or why it does not take part."""
        identity = ConfigRecord({"client-id": self.home.client})
        reply = RecordDict({IDENTITY: identity})
        run = "unknown"
        try:
            said = Terms.from_record(message.content[TERMS])
            run = said.run
            worker = self._build(said)
            own = terms_of(worker, said.run, said.config, said.clients)
            difference = said.differing(own)
            if difference is not None:
                raise FedloraError(f"the terms of the run: {difference}")
        except FedloraError as error:
            log.warning("run refused: %s", error)
            identity["refused"] = str(error)
            return self.guard.refused(run, str(error), Message(reply, reply_to=message))
        self.guard.received(run, message)
        self._sessions = {message.metadata.run_id: (run, worker)}
        self.home.folder_of(run).mkdir(parents=True, exist_ok=True)
        write_atomically(self._terms_file(message.metadata.run_id), json.dumps(dict(said.record())))
        log.info("joined run %s, terms %s", run, said.fingerprint)
        self.guard.audit.write("agreed", run=run, terms=said.fingerprint, session=message.metadata.run_id)
        reply[TERMS] = own.record()
        return self.guard.answered(run, Message(reply, reply_to=message))

    def _terms_file(self, run_id: int) -> Path:
        """Where the terms of Flower's run of this number are; a run of ours that is resumed has a new number."""
        return self.home.folder / f"session-{run_id:x}.json"

    def _session(self, run_id: int) -> tuple[str, Worker]:
        """Id and worker of the run that has this number at Flower."""
        if run_id not in self._sessions:
            path = self._terms_file(run_id)
            if not path.exists():
                raise FedloraError("this client has not agreed to the terms of this run, and does nothing for it")
            terms = Terms.from_record(ConfigRecord(json.loads(path.read_text())))
            self._sessions = {run_id: (terms.run, self._build(terms))}
        return self._sessions[run_id]

    def _build(self, terms: Terms) -> Worker:
        """A worker for a run, with the rows of this client alone and randomness from its own machine."""
        folder = self.home.folder_of(terms.run)
        values: dict[str, Any] = json.loads(terms.config)
        config = load_config(values)
        self.guard.check_run(terms, config)
        backbone = config.backbone.model_copy(update={"path": self.home.backbone or config.backbone.path})
        with unspoken():
            data = own_data(config, Schema(terms.labels), self.home.data, **self.home.columns)
        engine = EngineConfig(name="loop", workers=0, packing=config.engine.packing)
        everyone = config.cohort.model_copy(update={"size": None})  # how many take part is the server's affair
        update = {"backbone": backbone, "data": data, "engine": engine, "cohort": everyone, "run_dir": str(folder)}
        config = config.model_copy(update=update)
        with unspoken():
            dataset = client_dataset(config, task_of(config), self.home.client, data, terms.clients)
        self.guard.check_rows(terms, config, len(dataset.index.train[self.home.client]))
        federation = Federation(config, dataset)
        with unspoken():
            len(federation.rows)  # labels and texts are read here
        return Worker(federation, ClientStore(folder / "clients"), deployed=True)


@contextmanager
def unspoken() -> Iterator[None]:
    """What is wrong with rows may hold something of them: it is written to the client's own log, and goes nowhere else.

    Raises:
        FedloraError: instead of any ``InputError``, with nothing of it.
    """
    try:
        yield
    except InputError as error:
        log.error("%s", error)
        raise FedloraError("its rows do not suit the run; the client's own log says why") from error
