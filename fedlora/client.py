"""The client side: a worker that trains any client of the federation, and the Flower ClientApp around it.

The same code serves every engine. Whatever a client keeps between rounds lives in the store; the worker itself only
holds the frozen backbone, so it can train one client after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora import validation, wire
from fedlora.adapters import State
from fedlora.capability import announcement
from fedlora.cohort import Member, Trained
from fedlora.config import Config
from fedlora.errors import FedloraError, InputError
from fedlora.evaluation import loss_gradients
from fedlora.federation import Federation
from fedlora.grid import error_reply, parts_of
from fedlora.held import Held
from fedlora.layouts import Layouts
from fedlora.model import AdaptedModel
from fedlora.personal.model import PersonalModel
from fedlora.personal.trainer import PersonalTrainer
from fedlora.privacy.budget import Budget
from fedlora.privacy.client_level import clipped, moved, update_of
from fedlora.privacy.mechanism import Mechanism, mechanism_for
from fedlora.privacy.randomness import Seeded, System
from fedlora.protocol import CAPABILITY, CLIP, EPSILON, EXAMPLES, LOSS, NOISE
from fedlora.ranks import crop, pad
from fedlora.schedule import learning_rate
from fedlora.seeding import derive_seed, numpy_rng
from fedlora.store import ClientRecord, ClientStore
from fedlora.trainer import Frozen, Trainer
from fedlora.training import pack_batches


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
        parts: the factors that it trains and sends; none: all.
        member: its tensors, rows and random streams.
    """

    message: Message
    client: str
    server_round: int
    pool: tuple[str, ...]
    personal: bool
    references: Mapping[str, str]
    parts: tuple[str, ...]
    member: Member


class Worker:
    """The clients of one process: reads what they are asked, trains them on one backbone, writes what they keep."""

    def __init__(self, federation: Federation, store: ClientStore, deployed: bool = False) -> None:
        """``deployed``: the randomness of privacy comes from the operating system, and not from the run's seed."""
        self.federation = federation
        self.store = store
        self.deployed = deployed
        privacy = federation.config.privacy
        self.budget = Budget(store, privacy) if privacy.name == "record" else None
        self.model: AdaptedModel = federation.build_model()
        self.initial: State = self.model.read(self.model.per_client)
        self.seeded_frozen: State = self.model.read(self.model.frozen)
        self._held = Held(store, self.model)
        self._layouts = Layouts(self.model, federation.capability)
        self._unpacked: tuple[ArrayRecord, wire.Layout, State] | None = None
        self._packed = False

    @cached_property
    def trainer(self) -> Trainer:
        """Trains on the worker's model."""
        self.pack()
        federation = self.federation
        trainer = PersonalTrainer if isinstance(self.model, PersonalModel) else Trainer
        return trainer(self.model, federation.task, federation.rows, federation.config.client)

    def pack(self) -> str | None:
        """Skip padding from now on, in training and evaluation, if the configuration and the model allow it.

        Returns:
            Why the model does not, where it was asked to.
        """
        federation = self.federation
        if self._packed or not (federation.config.engine.packing and federation.rows.ragged):
            return None
        self._packed = True
        return pack_batches(self.model, federation.task, federation.rows, self._rows_of_length(0, 0.5, 1))

    def require_privacy(self) -> None:
        """See that the gradients of single records are what they should be, where clients are trained one by one.

        Raises:
            InputError: they are not.
        """
        if self.budget is None or self.trainer.axis is not None:
            return
        from fedlora.privacy.hooks import obstacle  # Opacus takes seconds to import

        reason = obstacle(self.model, self.federation.task, self.federation.rows, self._rows_of_length(0, 0.5, 1))
        if reason is not None:
            raise InputError(
                f"privacy=record cannot train adapter={self.federation.adapter.label} here: {reason}. Use another "
                "adapter or engine=cohort, or privacy=none."
            )

    def share_steps(self) -> str | None:
        """Train clients in common steps from now on; returns why that is not possible, if so."""
        self.trainer.share_steps(self._rows_of_length(0, 0.1, 0.2))
        return self.trainer.reason

    def _rows_of_length(self, *quantiles: float) -> np.ndarray:
        """Training rows at these quantiles of length."""
        rows = np.concatenate(list(self.federation.index.train.values()))
        if len(rows) == 0:  # the server of a deployment
            rows = np.arange(len(self.federation.rows))
        order = rows[np.argsort(self.federation.rows.lengths(rows), kind="stable")]
        return order[[round(q * (len(order) - 1)) for q in quantiles]]

    def handle(self, message: Message) -> Message:
        """Train the client that ``message`` addresses and reply with its shared tensors and metrics.

        A query is answered with what the client is able to train.

        Raises:
            FedloraError: the message cannot be understood, or training failed.
        """
        if message.metadata.message_type == MessageType.QUERY:
            return self._announcement(message)
        if validation.asks_for_gradients(message):
            return self._gradients(message)
        job = self.open(message)
        self.trainer.hold(self.frozen(job.references))
        return self.close(job, self.trainer.train([job.member])[0])

    def _asked(self, message: Message) -> dict[str, Any]:
        """The checked instructions of a message."""
        return validation.instructions(message, self.federation.index.train)

    def _announcement(self, message: Message) -> Message:
        client = self._asked(message)["client-id"]
        said = ConfigRecord(announcement(self.federation.capability(client)))
        return Message(RecordDict({CAPABILITY: said}), reply_to=message)

    def _gradients(self, message: Message) -> Message:
        """Reply with ``{module: [m, n]}``, the gradients of the client's training rows at the start, summed."""
        client, federation = self._asked(message)["client-id"], self.federation
        self.reset()
        rows, size = federation.index.train[client], federation.config.client.batch_size
        gradients = loss_gradients(self.model, federation.task, federation.rows, rows, size)
        return Message(RecordDict({"setup": wire.pack(gradients)}), reply_to=message)

    def open(self, message: Message) -> Job:
        """Read a message and what its client keeps, and make the client ready to train.

        Raises:
            FedloraError: the message cannot be understood, or what the client needs never reached it.
        """
        asked, content = self._asked(message), message.content
        server_round, client = asked["server-round"], asked["client-id"]
        personal, restart = asked.get("personal", False), asked.get("restart", False)
        pool, parts = tuple(asked.get("pool", ())) or (client,), parts_of(asked)
        keys = self.model.trains(parts, self.federation.capability(client))
        layout = {} if personal else self.layout(client)
        sent = self._sent(content, {key: layout[key] for key in layout if not restart or key in self.model.head})
        record = self.store.read(client, server_round)
        references = self._held.receive(record.references, content)
        state = {
            **self.start_of(client),
            **(self._restarted(server_round, client) if restart else {}),
            **record.private,
            **sent,
        }
        moments = {} if restart else record.optimizer
        member = self.member(self.narrowed(state, client), pool, server_round, client, moments, keys)
        if self.budget is not None and member.privacy is not None:
            self.budget.admit(client, len(member.rows), server_round, member.privacy)
        return Job(message, client, server_round, pool, personal, references, parts, member)

    def narrowed(self, state: State, client: str) -> State:
        """``state`` as a client of smaller rank can hold it."""
        return self.model.narrowed(state, self.federation.capability(client).rank)

    def start_of(self, client: str) -> State:
        """What ``client`` starts from before it hears from the server: the seeded start, and what is its own."""
        start = self.model.held(self.initial, self.federation.capability(client))
        return {**start, **self.model.own_of(client)}

    def _sent(self, content: RecordDict, layout: wire.Layout) -> State:
        """The tensors that came with a message; those of the clients of a round are mostly the same record."""
        record = content.array_records.get("arrays")
        if record is None and layout:
            raise FedloraError("it holds no 'arrays' record")
        if record is None:
            return {}
        if not layout:
            raise FedloraError("it holds tensors that this client has no use for")
        if self._unpacked is None or self._unpacked[0] is not record or self._unpacked[1] != layout:
            state = validation.tensors(record, layout, self.federation.config.wire.dtype)
            self._unpacked = record, layout, pad(state, self.model.shapes(layout))
        return self._unpacked[2]

    def _restarted(self, server_round: int, client: str) -> State:
        """New factors, drawn for this client and round."""
        self.model.initialise(derive_seed(self.federation.config.seed, "restart", server_round, client))
        return self.model.read(key for key in self.model.trainable if key not in self.model.head)

    def member(
        self,
        state: State,
        pool: Iterable[str],
        server_round: int,
        stream: str,
        moments: Mapping[str, torch.Tensor] | None = None,
        keys: tuple[str, ...] | None = None,
    ) -> Member:
        """What the trainer needs to train ``state`` on the rows of ``pool``.

        The order of rows depends on (seed, round, ``stream``) only.
        """
        config, pool = self.federation.config, tuple(pool)
        rows = np.concatenate([self.federation.index.train[client] for client in pool])
        return Member(
            pool[0],
            state,
            rows,
            partial(numpy_rng, config.seed, "batches", server_round, stream),
            derive_seed(config.seed, "dropout", server_round, stream),
            partial(learning_rate, config.client, server_round, config.rounds),
            moments or {},
            self.model.trainable if keys is None else keys,
            self._mechanism(len(rows), server_round, stream),
        )

    def _mechanism(self, records: int, server_round: int, stream: str) -> Mechanism | None:
        """How the records of a client are protected in a round."""
        config = self.federation.config
        if self.budget is None:
            return None
        seed = None if self.deployed else derive_seed(config.seed, "privacy", server_round, stream)
        return mechanism_for(config.privacy, config.client, config.rounds, stream, records, seed)

    def close(self, job: Job, trained: Trained) -> Message:
        """Store what a trained client keeps, and reply with what it sends.

        Raises:
            FedloraError: its training failed.
        """
        if trained.failure:
            raise FedloraError(
                f"{trained.failure} of client '{job.client}' in round {job.server_round}. "
                f"Lower client.lr (now {self.federation.config.client.lr})"
            )
        state = self.federation.adapter.settled(trained.state)
        kept = self.model.trainable if job.personal else self.model.private
        moments = {**job.member.moments, **trained.moments} if trained.moments else {}
        if kept or job.references or moments:
            private = {key: state[key] for key in kept if key in state}  # all of them, or those of its own model
            record = ClientRecord(private, job.references, moments)
            self.store.write(job.client, job.server_round, record)
        privacy = self.federation.config.privacy
        metrics = MetricRecord({EXAMPLES: len(job.member.rows) if privacy.send_counts else 1})
        if privacy.send_losses:
            metrics[LOSS] = trained.loss
        if self.budget is not None and job.member.privacy is not None:
            records, mechanism = len(job.member.rows), job.member.privacy
            metrics[EPSILON] = self.budget.spent(job.client, records, job.server_round, mechanism)
        reply = RecordDict({"metrics": metrics})
        if not job.personal:
            layout = self.answer_layout(job.client, job.parts)
            sent = self._private_update(job, crop({key: state[key] for key in layout}, layout))
            reply["arrays"] = wire.pack(sent, self.federation.config.wire.dtype)
        return Message(reply, reply_to=job.message)

    def _private_update(self, job: Job, state: State) -> State:
        """``state`` with its update clipped and noise of the client's own on it, if the message asks for that."""
        asked = job.message.content.config_records["config"]
        if CLIP not in asked:
            return state
        start = {key: job.member.state[key] for key in state}
        update = clipped(update_of(state, start), float(asked[CLIP]))  # pyright: ignore
        seed = derive_seed(self.federation.config.seed, "privacy", job.server_round, job.client)
        noise = (System() if self.deployed else Seeded(seed)).normal(update.shape, float(asked[NOISE]))  # pyright: ignore
        return moved(start, update + noise)

    def spent(self, clients: Iterable[str], server_round: int) -> dict[str, float]:
        """Epsilon of everything that ``clients`` have released up to a round, where this store has their releases.

        In a simulation that is known of clients, too, whose last reply never reached the server.
        """
        if self.budget is None:
            return {}
        found = {}
        for client in clients:
            if self.budget.path(client).exists():
                records = len(self.federation.index.train[client])
                mechanism = self._mechanism(records, server_round, client)
                assert mechanism is not None
                found[client] = self.budget.spent(client, records, server_round, mechanism)
        return found

    def frozen(self, references: Mapping[str, str]) -> Frozen:
        """The basis and the base correction of a client."""
        key = references.get("setup"), references.get("correction")
        factors = self._held.content("setup", references) or self.seeded_frozen
        return Frozen(key, factors, self._held.content("correction", references))

    def layout(self, client: str) -> wire.Layout:
        """Names and shapes of what travels to ``client``."""
        return self._layouts.down(client)

    def answer_layout(self, client: str, parts: tuple[str, ...] = ()) -> wire.Layout:
        """Names and shapes of what travels from ``client`` when it was asked to train ``parts`` (none: everything)."""
        return self._layouts.up(client, parts)

    def reset(self) -> None:
        """Put the model back to its seeded start, whatever it was used for before."""
        self.model.load({**self.initial, **self.seeded_frozen})
        self.model.set_base_correction({})

    def personal(self, client: str, before_round: int) -> tuple[State, Frozen]:
        """What ``client`` has before a round: every trained tensor, those it keeps among them, and what is frozen."""
        record = self.store.read(client, before_round)
        return {**self.start_of(client), **record.private}, self.frozen(record.references)


def asks_for_training(message: Message) -> bool:
    """Whether a client is asked to train, and not for what it can train or for gradients."""
    return message.metadata.message_type == MessageType.TRAIN and not validation.asks_for_gradients(message)


def client_app(worker: Callable[[], Worker]) -> ClientApp:
    """The Flower ClientApp around the worker of its process.

    A client that fails answers with an error message that says why; it costs its own update only.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            return worker().handle(message)
        except FedloraError as error:
            return error_reply(message, str(error))

    app.train()(handle)
    app.query()(handle)
    return app


@lru_cache(maxsize=1)
def worker_for(config: str, run_dir: str) -> Worker:
    """The worker of this process for a run, built on first use from the resolved configuration as JSON."""
    settings = Config.model_validate_json(config)
    if settings.engine.threads:
        torch.set_num_threads(settings.engine.threads)
    return Worker(Federation(settings), ClientStore(Path(run_dir) / "clients"))


def instruct(client: str, server_round: int, **more: Any) -> ConfigRecord:
    """The configuration record that tells a client what to do."""
    return ConfigRecord({"server-round": server_round, "client-id": client, **more})
