"""The round loop: select, train, aggregate, evaluate, write down. The same for every strategy and engine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import Strategy

from fedlora import wire
from fedlora.adapters import State
from fedlora.capability import Capability, announced, announcement
from fedlora.client import Worker
from fedlora.grid import ClientGrid, CodecGrid, SetupGrid, collector_paused
from fedlora.layouts import Layouts
from fedlora.ledger import Ledger
from fedlora.meter import MeterGrid
from fedlora.privacy.accounting import finite
from fedlora.privacy.statement import origin
from fedlora.validation import ReplyRules
from simulations import checkpoint
from simulations.announcements import Capabilities
from simulations.callbacks import Callback
from simulations.client_gradients import GradientGrid, ask, summed
from simulations.client_privacy import client_level
from simulations.evaluator import Evaluation, Evaluator, statistics
from simulations.exactness import Exactness
from simulations.faults import FaultGrid
from simulations.replies import Replies, alike, failed_in, nameless, spent_by
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
        self._replies = Replies(self.config, self.ledger)
        self._communicates = self.ours is None or self.ours.communicates

    def connect(self, engine: ClientGrid) -> ClientGrid:
        """Stack codec, setup and meter on an engine."""
        self._engine = engine
        differences = self.federation.differences if self._communicates else {}
        self._capabilities = Capabilities(
            self._metered(engine), self.worker.model, differences, self._known, self.config.cohort.deadline
        )
        self._known = self._capabilities.known
        if self.ours is not None:
            self.ours.begin_run(Server(self.frozen, self._public_gradients, self._capabilities.of))
        self._setup = SetupGrid(self._metered(engine), self.frozen if self.sends_frozen else {}, self._delivered)
        self._delivered = self._setup.delivered
        layouts = Layouts(self.worker.model, self._capabilities.of)
        rules = ReplyRules.of(self.config)
        return CodecGrid(self._setup, layouts.down, layouts.up, self.config.wire.dtype, rules)

    def _metered(self, engine: ClientGrid) -> ClientGrid:
        if not self._communicates:
            return engine
        faults = self.config.faults
        return MeterGrid(engine if faults.name == "none" else FaultGrid(engine, faults, self.config.seed), self.ledger)

    def run(self, engine: ClientGrid) -> None:
        """Run all rounds that are left.

        Raises:
            FedloraError: no client of a round returned a usable reply.
        """
        self._tell(lambda c: c.on_start(self.config.method, self.rounds, max(self.completed, 0)))
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
            replies = ask(grid, chosen, self.config.cohort.deadline)
        failures = self._replies.failures(0, failed_in(replies, grid), len(replies))
        model.initialise(self.config.seed, summed(self._replies.counted(0, replies, grid)))
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
            chosen = self._chosen(server_round)
            refused = self._meet(server_round, chosen)
            asked = [client for client in chosen if client not in refused]
            grid.begin_round(server_round, asked or [NOBODY], self._replies.enough)
            before = wire.to_record(self.state)
            more = ConfigRecord({} if self.client_level is None else self.client_level.instructions())
            messages = list(self.strategy.configure_train(server_round, before, more, grid))
            self._tell(lambda c: c.on_round_start(server_round, len(chosen)))
        with self._clock("train"):
            replies = grid.send_and_receive(messages, timeout=self.config.cohort.deadline) if asked else []
        failures = refused | self._replies.failures(server_round, failed_in(replies, grid), len(replies))
        with self._clock("aggregate"), collector_paused():
            self.epsilons |= spent_by(replies, grid) | self.worker.spent(failures, server_round)
            loss, error = self._aggregate(server_round, grid, messages, replies)
        del replies, messages  # no longer held while the round is evaluated
        self._complete(server_round, chosen, loss if asked else None, failures, error)

    def _chosen(self, server_round: int) -> Sequence[str]:
        """The clients of a round, with spares where their replies can be lost."""
        drawn = cohort(self.config, self.federation.clients, server_round)
        return drawn if self._communicates else drawn[: self._replies.enough]

    def _aggregate(
        self, server_round: int, grid: ClientGrid, messages: Sequence[Message], replies: Sequence[Message]
    ) -> tuple[Any, float | str]:
        """Make the next state of what came back.

        Returns:
            The training loss, and the aggregation error or why there is none.
        """
        replies = self._replies.counted(server_round, replies, grid)
        skipped = self._replies.too_few(server_round, replies)
        if skipped is not None:
            self.strategy.aggregate_train(server_round, [])
            return None, skipped
        if self.client_level is None:
            owners = [grid.client_of(reply.metadata.src_node_id) for reply in replies]
            self._exactness.expect(replies, owners, self.state, self.frozen)
        else:
            whole = self.ours is not None
            replies = self.client_level.release(server_round, self.state, messages, replies, whole)
        replies = replies if self.ours is not None else alike(replies)
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        if arrays is not None:
            self.state = wire.from_record(arrays)
            self._refreeze(self.ours.frozen() if self.ours is not None else {})
        return None if metrics is None else metrics.get("train_loss"), self._error(arrays is not None)

    def _meet(self, server_round: int, chosen: Sequence[str]) -> dict[str, str]:
        """Which of the ``chosen`` clients cannot take part in a round, and why."""
        absent = self._engine.meet(server_round, chosen, self.ledger)
        unable = self._capabilities.meet(server_round, [client for client in chosen if client not in absent])
        return self._replies.failures(server_round, absent | unable, len(chosen))

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
            **statistics(evaluation or Evaluation({}, None)),
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
            self.best = {"round": server_round, **statistics(evaluation)}

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
