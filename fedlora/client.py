"""The client side: a worker that trains any client of the federation, and the Flower ClientApp around it.

The same code serves every engine. Whatever a client keeps between rounds lives in the store; the worker itself only
holds the frozen backbone, so it can train one client after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora import correction, wire
from fedlora.adapters import State
from fedlora.config import Config, load_config
from fedlora.errors import FedloraError
from fedlora.federation import Federation
from fedlora.grid import error_reply
from fedlora.model import AdaptedModel
from fedlora.ranks import crop, pad
from fedlora.schedule import learning_rate
from fedlora.seeding import derive_seed, numpy_rng
from fedlora.store import ClientRecord, ClientStore
from fedlora.training import train_steps

KNOWN_INSTRUCTIONS = {"server-round", "client-id", "pool", "personal", "correction", "restart"}


class Result(NamedTuple):
    """What training gave: mean loss, number of examples, and the optimiser's moments if they are kept."""

    loss: float
    examples: int
    moments: State


@dataclass(frozen=True)
class Job:
    """A client that is ready to train.

    Attributes:
        message: what it was asked.
        client: its id.
        server_round: the round.
        pool: the clients whose rows it trains on: itself, or the pool of ``central``.
        personal: whether it keeps its whole state and sends no tensors.
        references: names of the shared content it holds.
        moments: the optimiser state to continue from.
    """

    message: Message
    client: str
    server_round: int
    pool: tuple[str, ...]
    personal: bool
    references: Mapping[str, str]
    moments: Mapping[str, torch.Tensor]


class Worker:
    """Holds one backbone and trains clients on it, one after the other (the oracle of every faster engine)."""

    def __init__(self, federation: Federation, store: ClientStore) -> None:
        self.federation = federation
        self.store = store
        self.model: AdaptedModel = federation.build_model()
        self.initial: State = self.model.read(self.model.trainable)
        self.seeded_frozen: State = self.model.read(self.model.frozen)
        self._shared_content: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
        self._layouts: dict[int | None, wire.Layout] = {}

    def handle(self, message: Message) -> Message:
        """Train the client that ``message`` addresses and reply with its shared tensors and metrics."""
        job = self.open(message)
        return self.close(job, self.train(job.pool, job.server_round, job.client, job.moments))

    def open(self, message: Message) -> Job:
        """Read a message and put the client that it addresses into the model, ready to train.

        Raises:
            FedloraError: the message cannot be understood, or what the client needs never reached it.
        """
        content = message.content
        instructions = dict(content.config_records["config"])
        server_round, client = int(instructions["server-round"]), str(instructions["client-id"])  # pyright: ignore
        unknown = set(instructions) - KNOWN_INSTRUCTIONS
        if unknown:
            raise FedloraError(f"the strategy asks for {sorted(unknown)}, which this client does not do")
        personal = bool(instructions.get("personal", False))
        pool = tuple(str(name) for name in instructions.get("pool", []))  # pyright: ignore

        record = self.store.read(client, server_round)
        references = self._receive(record.references, content)
        self._prepare(record, references)
        restart = bool(instructions.get("restart", False))
        if restart:
            self.model.initialise(derive_seed(self.federation.config.seed, "restart", server_round, client))
        if not personal:
            sent = {key: shape for key, shape in self.layout(client).items() if not restart or key in self.model.head}
            if sent:
                state = wire.unpack(content.array_records["arrays"], sent, self.federation.config.wire.dtype)
                self.model.load(pad(state, self.model.shapes(sent)))
        self.model.narrow(self.federation.rank_of(client))
        moments = {} if restart else record.optimizer
        return Job(message, client, server_round, pool or (client,), personal, references, moments)

    def close(self, job: Job, result: Result) -> Message:
        """Store what the trained client in the model keeps, and reply with what it sends."""
        kept = self.model.trainable if job.personal else self.model.private
        if kept or job.references or result.moments:
            record = ClientRecord(self.model.read(kept), job.references, result.moments)
            self.store.write(job.client, job.server_round, record)
        reply = RecordDict({"metrics": MetricRecord({"num-examples": result.examples, "train_loss": result.loss})})
        if not job.personal:
            layout = self.layout(job.client)
            reply["arrays"] = wire.pack(crop(self.model.read(layout), layout), self.federation.config.wire.dtype)
        return Message(reply, reply_to=job.message)

    def rows_of(self, job: Job) -> np.ndarray:
        """The training rows of a job, in the order of its pool."""
        return np.concatenate([self.federation.index.train[client] for client in job.pool])

    def hold_frozen(self, references: Mapping[str, str]) -> None:
        """Put the basis and the base correction of a client into the model."""
        if self.federation.adapter.broadcast_frozen:
            self.model.load(self._content("setup", references) or self.seeded_frozen)
        self.model.set_base_correction(self._content("correction", references))

    def layout(self, client: str) -> wire.Layout:
        """Names and shapes of what travels to and from ``client``."""
        rank = self.federation.rank_of(client)
        if rank not in self._layouts:
            self._layouts[rank] = self.model.layout(rank)
        return self._layouts[rank]

    def reset(self) -> None:
        """Put the model back to its seeded start, whatever it was used for before."""
        self.model.load({**self.initial, **self.seeded_frozen})
        self.model.set_base_correction({})

    def load_personal(self, client: str, before_round: int) -> None:
        """Put what ``client`` keeps privately into the model, for evaluation."""
        record = self.store.read(client, before_round)
        self._prepare(record, record.references)

    def train(
        self, clients: Iterable[str], server_round: int, stream: str, moments: Mapping[str, torch.Tensor] | None = None
    ) -> Result:
        """Train the loaded state on the rows of ``clients``, continuing from the optimiser's ``moments``.

        The order of rows depends on (seed, round, ``stream``) only.

        Raises:
            FedloraError: a loss is not finite.
        """
        federation, config = self.federation, self.federation.config
        rows = np.concatenate([federation.index.train[client] for client in clients])
        rng = numpy_rng(config.seed, "batches", server_round, stream)
        rate = partial(learning_rate, config.client, server_round, config.rounds)
        dropout = derive_seed(config.seed, "dropout", server_round, stream)
        try:
            loss, kept = train_steps(
                self.model, federation.task, federation.rows, rows, config.client, rng, rate, dropout, moments or {}
            )
        except FedloraError as error:
            raise FedloraError(
                f"{error} of client '{stream}' in round {server_round}. Lower client.lr (now {config.client.lr})"
            ) from error
        return Result(loss, len(rows), kept)

    def _receive(self, held: Mapping[str, str], content: RecordDict) -> dict[str, str]:
        """Store what came with the message beyond the shared tensors; return the client's new references."""
        references = dict(held)
        setup = content.array_records.get("setup")
        if setup is not None:
            key = _key("setup", setup)
            if not self.store.has_shared(key):
                self.store.put_shared(key, wire.unpack(setup, self.model.shapes(self.model.frozen)))
            references["setup"] = key
        if self.federation.adapter.broadcast_frozen and "setup" not in references:
            raise FedloraError("the frozen basis never reached this client")
        header = content.config_records["config"].get("correction")
        if header is not None:
            references["correction"] = self._correct(references, str(header), content.array_records["correction"])
        return references

    def _correct(self, references: Mapping[str, str], header: str, record: ArrayRecord) -> str:
        """Bring the client's base correction up to date; content reached by the same way is computed once."""
        since, until = correction.versions(header)
        before = references.get("correction", "0-none")
        held_version = int(before.split("-")[0])
        if since is not None and since != held_version:
            raise FedloraError(f"base correction {since} expected, but this client holds {held_version}")
        digest = hashlib.blake2b(f"{before}|{header}|{_key('correction', record)}".encode(), digest_size=12).hexdigest()
        key = f"{until}-{digest}"
        if not self.store.has_shared(key):
            shapes = {name: (int(x.out_features), int(x.in_features)) for name, x in self.model.layers.items()}  # pyright: ignore
            tensors = wire.unpack(record, correction.layout_of(header, shapes))
            held = self.store.get_shared(before) if "correction" in references else {}
            self.store.put_shared(key, correction.apply_update(held, header, tensors))
        return key

    def _prepare(self, record: ClientRecord, references: Mapping[str, str]) -> None:
        """Set the model to this client: seeded start, its basis, its base correction, its private tensors."""
        self.model.load(self.initial)
        self.hold_frozen(references)
        self.model.load(record.private)

    def _content(self, kind: str, references: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Shared content of a client, kept in memory while clients refer to the same."""
        key = references.get(kind)
        if key is None:
            return {}
        cached = self._shared_content.get(kind)
        if cached is None or cached[0] != key:
            cached = self._shared_content[kind] = (key, self.store.get_shared(key))
        return cached[1]


def _key(kind: str, record: ArrayRecord) -> str:
    return f"{kind}-{hashlib.blake2b(record[wire.PACKED].data, digest_size=12).hexdigest()}"


def client_app(config: Mapping[str, Any], run_dir: str) -> ClientApp:
    """The Flower ClientApp of a run. ``config`` is the resolved configuration as plain values.

    A client that fails answers with an error message that says why; it costs its own update only.
    """
    app = ClientApp()
    values = load_config(config).model_dump_json()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            return worker_for(values, run_dir).handle(message)
        except FedloraError as error:
            return error_reply(message, str(error))

    return app


@lru_cache(maxsize=1)
def worker_for(config: str, run_dir: str) -> Worker:
    """The worker of this process for a run, built on first use."""
    settings = Config.model_validate_json(config)
    if settings.engine.threads:
        torch.set_num_threads(settings.engine.threads)
    return Worker(Federation(settings), ClientStore(Path(run_dir) / "clients"))


def instruct(client: str, server_round: int, **more: Any) -> ConfigRecord:
    """The configuration record that tells a client what to do."""
    return ConfigRecord({"server-round": server_round, "client-id": client, **more})
