"""The round loop: select, train, aggregate, evaluate, write down. The same for every strategy and engine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, cast

from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import Strategy

from fedlora import wire
from fedlora.adapters import State
from fedlora.capability import Capability, announced, announcement
from fedlora.client import Worker
from fedlora.errors import FedloraError, InputError
from fedlora.grid import ClientGrid, CodecGrid, SetupGrid, collector_paused, reason_of
from fedlora.layouts import Layouts
from fedlora.ledger import Ledger
from fedlora.meter import MeterGrid
from fedlora.privacy.accounting import finite
from fedlora.privacy.budget import SITS_OUT
from fedlora.privacy.statement import origin
from fedlora.protocol import EPSILON
from fedlora.validation import ReplyRules
from simulations import checkpoint
from simulations.announcements import Capabilities
from simulations.callbacks import Callback
from simulations.client_gradients import GradientGrid, ask, summed
from simulations.client_privacy import client_level
from simulations.evaluator import Evaluation, Evaluator
from simulations.exactness import Exactness
from simulations.run_folder import RunFolder
from simulations.sampler import NOBODY, cohort
from strategies.base import FederatedStrategy, Server

PHASES: tuple[str, ...] = ("select", "train", "aggregate", "evaluate", "other")
log = logging.getLogger("fedlora")


class FederatedRun:
    """One run: its global state, its strategy, its ledger. Made new or from a checkpoint, then :meth:`finish`-ed."""

    def __init__(
        self, worker: Worker, strategy: Strategy, folder: RunFolder, callbacks: Sequence[Callback] = ()
    ) -> None:
        """Prepare a run of ``strategy`` in ``folder``, continuing from its checkpoint if there is one."""
        self.federation = worker.federation
        self.config = worker.federation.config
        self.folder = folder
        self.callbacks = callbacks
        self.strategy = strategy
        self.ours = strategy if isinstance(strategy, FederatedStrategy) else None
        self.rounds = self.config.rounds if self.ours is None or self.ours.trains else 0
        self.client_level = client_level(self.federation, worker.model, strategy)
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        saved = checkpoint.load(folder.checkpoint)
        if saved is None:
            worker.reset()
            self.federation.initialise_on_server(worker.model)
            self.state: State = worker.model.read(worker.model.shared)
            self.frozen: State = worker.model.read(worker.model.frozen)
            self.ledger, self.completed, self.best = Ledger(), -1, None
            delivered: list[str] = []
            self._known: dict[str, Capability] = {}
            self.epsilons: dict[str, float] = {}
            self.sends_frozen = self.federation.adapter.broadcast_frozen
        else:
            at, self.ledger = saved
            self.state, self.frozen, self.completed, self.best = at.state, at.frozen, at.round, at.best
            checkpoint.restore_strategy(self.strategy, at.strategy)
            if self.client_level is not None:
                self.client_level.load_state_dict(at.privacy)
            delivered, self.sends_frozen, self.epsilons = at.delivered, at.setup, dict(at.epsilons)
            self._known = {client: announced(said, said) for client, said in at.capabilities.items()}
        folder.truncate_rounds(self.completed)
        self._saved_round = self.completed
        self._unrecorded = 0.0  # seconds after the previous round was written down: its checkpoint
        self._delivered = set(delivered)
        self.worker = worker
        self.evaluator = Evaluator(worker, self.frozen)
        self._engine_changes: dict[str, Any] = {}
        self._engine: ClientGrid
        self._exactness = Exactness(worker.model, self.ours, self.config.seed)

    def connect(self, engine: ClientGrid) -> ClientGrid:
        """Stack codec, setup and meter on an engine."""
        communicates = self.ours is None or self.ours.communicates
        differences = self.federation.differences if communicates else {}
        self._capabilities = Capabilities(self._metered(engine), self.worker.model, differences, self._known)
        self._known = self._capabilities.known
        if self.ours is not None:
            self.ours.begin_run(Server(self.frozen, self._public_gradients, self._capabilities.of))
        self._setup = SetupGrid(self._metered(engine), self.frozen if self.sends_frozen else {}, self._delivered)
        self._delivered = self._setup.delivered
        layouts = Layouts(self.worker.model, self._capabilities.of)
        rules = ReplyRules.of(self.config)
        return CodecGrid(self._setup, layouts.down, layouts.up, self.config.wire.dtype, rules)

    def _metered(self, engine: ClientGrid) -> ClientGrid:
        return MeterGrid(engine, self.ledger) if self.ours is None or self.ours.communicates else engine

    def run(self, engine: ClientGrid) -> None:
        """Run all rounds that are left.

        Raises:
            FedloraError: no client of a round returned a usable reply.
        """
        self._tell(lambda c: c.on_start(self.config.method, self.rounds, max(self.completed, 0)))
        self._engine = engine
        met = engine.meet(max(self.completed, 0), self.federation.clients, self.ledger)
        asked, failures = self._start_from_clients(engine) if self.completed < 0 else ((), {})
        failures = failures or met
        grid = self.connect(engine)
        if self.completed < 0:
            self._complete(0, asked, None, failures, None)
        for server_round in range(self.completed + 1, self.rounds + 1):
            self._round(server_round, grid)
        self._write_engine_changes()

    def _start_from_clients(self, engine: ClientGrid) -> tuple[Sequence[str], dict[str, str]]:
        """Where the adapter starts from gradients of clients: who was asked for them, and who failed."""
        if not (self.federation.adapter.needs_client_gradients and self.rounds):
            return (), {}
        chosen, model = cohort(self.config, self.federation.clients, 1), self.worker.model
        grid = GradientGrid(self._metered(engine), model.weight_shapes)
        with self._clock("train"):
            replies = ask(grid, chosen)
        failures = self._failures(0, failed_in(replies, grid), len(replies))
        model.initialise(self.config.seed, summed(replies))
        self.state = model.read(model.shared)
        self.frozen = self.evaluator.frozen = model.read(model.frozen)
        return chosen, failures

    def change_engine(self, **values: Any) -> None:
        """Note what of the engine had to change; written down with the next checkpoint, so that both fit together."""
        self._engine_changes |= values

    def _write_engine_changes(self) -> None:
        if self._engine_changes:
            self.folder.change_engine(**self._engine_changes)
            self._engine_changes = {}

    def _round(self, server_round: int, grid: ClientGrid) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        with self._clock("select"), collector_paused():
            chosen = cohort(self.config, self.federation.clients, server_round)
            refused = self._meet(server_round, chosen)
            grid.begin_round(server_round, [client for client in chosen if client not in refused] or [NOBODY])
            before = wire.to_record(self.state)
            more = ConfigRecord({} if self.client_level is None else self.client_level.instructions())
            messages = list(self.strategy.configure_train(server_round, before, more, grid))
            self._tell(lambda c: c.on_round_start(server_round, len(chosen)))
        with self._clock("train"):
            replies = list(grid.send_and_receive(messages)) if chosen else []
        failures = refused | self._failures(server_round, failed_in(replies, grid), len(replies))
        with self._clock("aggregate"), collector_paused():
            owners = [grid.client_of(reply.metadata.src_node_id) for reply in replies]
            self.epsilons |= spent_by(replies, owners)
            if self.client_level is None:
                self._exactness.expect(replies, owners, self.state, self.frozen)
            else:
                whole = self.ours is not None
                replies = self.client_level.release(server_round, self.state, messages, replies, whole)
            arrays, metrics = self.strategy.aggregate_train(server_round, replies)
            if arrays is not None:
                self.state = wire.from_record(arrays)
                self._refreeze(self.ours.frozen() if self.ours is not None else {})
            error = self._error(arrays is not None)
        del replies, messages  # no longer held while the round is evaluated
        loss = None if metrics is None or not chosen else metrics.get("train_loss")
        self._complete(server_round, chosen, loss, failures, error)

    def _meet(self, server_round: int, chosen: Sequence[str]) -> dict[str, str]:
        """Which of the ``chosen`` clients cannot take part in a round, and why."""
        absent = self._engine.meet(server_round, chosen, self.ledger)
        unable = self._capabilities.meet(server_round, [client for client in chosen if client not in absent])
        return self._failures(server_round, absent | unable, len(chosen))

    def _error(self, aggregated: bool) -> float | str:
        """The aggregation error of the round, or why there is none."""
        if self.client_level is not None:
            return "clipped and noisy"
        return self._exactness.error(self.state, self.frozen) if aggregated else "no replies"

    def _epsilon(self, server_round: int) -> float | None:
        """What has been spent by the client that has spent most; ``None`` without privacy, or without noise."""
        if self.client_level is not None:
            return self.client_level.epsilon(server_round)
        return finite(max(self.epsilons.values(), default=math.inf))

    def _public_gradients(self, state: State) -> State:
        self.evaluator.load(state, self.ours)
        return self.federation.public_gradients(self.worker.model)

    def _refreeze(self, frozen: State) -> None:
        """Use ``frozen``, and send it to every client, from now on, if the strategy changed something."""
        if frozen:
            self.frozen = self.evaluator.frozen = frozen
            if self.ours is not None and self.ours.frozen_travels:
                self.sends_frozen = True
                self._setup.replace(frozen)

    def _failures(self, server_round: int, failed: dict[str, str], asked: int) -> dict[str, str]:
        """Note which clients failed and why; the round cannot go on if all that were ``asked`` did."""
        for client, reason in failed.items():
            self.ledger.refuse(server_round, client, reason)
        told = nameless(failed) if self.config.privacy.secret_cohort else failed
        for client, reason in told.items():
            log.warning("round %d: client '%s' failed: %s", server_round, client, reason)
        broken = {client: reason for client, reason in told.items() if not reason.startswith(SITS_OUT)}
        if broken and len(failed) == asked:
            client, reason = next(iter(broken.items()))
            kind = InputError if reason.startswith("the loss is") else FedloraError
            raise kind(f"Round {server_round}: every client failed. Client '{client}': {reason}.")
        return failed

    def _complete(
        self,
        server_round: int,
        chosen: Sequence[str],
        loss: Any,
        failures: dict[str, str],
        error: float | str | None,
    ) -> None:
        """Evaluate if it is time, write the round down, checkpoint."""
        started = time.perf_counter()
        every = self.config.eval.every
        evaluation = None
        if server_round % every == 0 or server_round == self.rounds:
            with self._clock("evaluate"):
                evaluation = self.evaluator.evaluate(self.ours, self.state, server_round)
                self.folder.write_clients(evaluation.each)
                self._keep_best(server_round, evaluation)
        measured = isinstance(error, float)
        record = {
            "round": server_round,
            "loss": loss,
            "metrics": evaluation.metrics if evaluation else {},
            "clients": evaluation.clients if evaluation else None,
            "unseen_clients": evaluation.unseen_clients if evaluation else None,
            "personalised_clients": evaluation.personalised_clients if evaluation else None,
            **self.ledger.round_totals(server_round),
            "aggregation_error": error if measured else None,
            "aggregation_error_reason": None if measured else (error or "before the first round"),
            "cohort": list(chosen),
            "failures": failures,
            "seconds": {},
            "epsilon": self._epsilon(server_round),
            "epsilon_median": finite(median(self.epsilons.values())) if self.epsilons else None,
            "privacy": None if self.config.privacy.name == "none" else origin(self.federation.deployed),
        }
        if self.config.privacy.secret_cohort:
            record |= {"cohort": None, "failures": nameless(failures)}
        self.completed = server_round
        self.seconds["other"] = time.perf_counter() - started - self.seconds["evaluate"] + self._unrecorded
        record["seconds"] = {phase: round(value, 6) for phase, value in self.seconds.items()}
        written = time.perf_counter()
        self.folder.append_round(record)
        self._tell(lambda c: c.on_round_end(record))
        self._checkpoint(server_round, chosen)
        self._unrecorded = time.perf_counter() - written

    def _checkpoint(self, server_round: int, chosen: Sequence[str]) -> None:
        every = self.config.checkpoint.every
        if not every or not (server_round % every == 0 or server_round == self.rounds):
            return
        state = checkpoint.Checkpoint(
            round=server_round,
            state=self.state,
            frozen=self.frozen,
            setup=self.sends_frozen,
            strategy=checkpoint.strategy_state(self.strategy),
            privacy={} if self.client_level is None else self.client_level.state_dict(),
            delivered=sorted(self._delivered),
            capabilities={client: announcement(capability) for client, capability in self._known.items()},
            best=self.best,
            epsilons=self.epsilons,
        )
        checkpoint.save(self.folder.checkpoint, state, self.ledger, self._saved_round)
        self._write_engine_changes()
        self._saved_round = server_round
        for client in chosen:
            self.folder.store.prune(client, server_round)

    def _keep_best(self, server_round: int, evaluation: Evaluation) -> None:
        key = f"validation_{self.federation.task.main_metric}"
        value = evaluation.metrics.get(key)
        if value is not None and (self.best is None or value > self.best["metrics"][key]):
            self.best = {
                "round": server_round,
                "metrics": evaluation.metrics,
                "clients": evaluation.clients,
                "unseen_clients": evaluation.unseen_clients,
                "personalised_clients": evaluation.personalised_clients,
            }

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started

    def _tell(self, event: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            event(callback)


def spent_by(replies: Sequence[Message], owners: Sequence[str]) -> dict[str, float]:
    """Epsilon of everything that clients have released, where they say it."""
    metrics = {
        o: r.content.metric_records.get("metrics", {}) for o, r in zip(owners, replies, strict=True) if r.has_content()
    }
    return {owner: cast(float, each[EPSILON]) for owner, each in metrics.items() if EPSILON in each}


def nameless(failures: Mapping[str, str]) -> dict[str, str]:
    """Failures without the ids of the clients, where nobody may learn who took part in the round."""
    reasons = [reason.replace(f"'{client}'", "'?'") for client, reason in failures.items()]
    return {f"? {number}": reason for number, reason in enumerate(reasons, 1)}


def failed_in(replies: Sequence[Message], grid: ClientGrid) -> dict[str, str]:
    """Why clients failed, by client."""
    return {grid.client_of(r.metadata.src_node_id): reason_of(r) for r in replies if r.has_error()}
