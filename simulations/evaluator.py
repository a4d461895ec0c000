"""Evaluate the state of a run: global validation and test sets, and every panel client on its own test rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlora.adapters import State
from fedlora.client import Worker
from fedlora.evaluation import (
    client_metrics,
    each_client,
    joined_statistics,
    row_statistics,
    split_statistics,
    statistics_of_clients,
)
from fedlora.tasks import Statistics
from fedlora.trainer import Frozen
from simulations.personalise import personalised
from simulations.sampler import panel
from strategies.base import FederatedStrategy

EachClient = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """Numbers of one evaluation.

    Attributes:
        metrics: ``validation_<name>`` and ``seen_<name>`` (held-out rows of training clients: for choosing, and for
            reporting) and ``test_<name>`` (whole unseen clients; absent where no single model exists).
        clients: mean, std, worst_decile and worst of the main metric over seen clients' own test rows.
        unseen_clients: the same over unseen clients, one by one; ``None`` where no single model exists.
        personalised_clients: as ``clients``, each with the global model after a round of training on its own rows
            (``eval.personalise``).
        each: number of ``rows`` and all metrics of each client, ``{kind: {client: {name: value}}}``; the kinds are
            ``seen``, ``unseen`` and ``personalised``, as above.
    """

    metrics: dict[str, float]
    clients: dict[str, float] | None
    unseen_clients: dict[str, float] | None = None
    personalised_clients: dict[str, float] | None = None
    each: Mapping[str, EachClient] = field(default_factory=dict)


def statistics(evaluation: Evaluation) -> dict[str, Any]:
    """What is written down of an evaluation, without the numbers of single clients."""
    return {name: value for name, value in vars(evaluation).items() if name != "each"}


class Evaluator:
    """Knows which rows are evaluated; the same rows for every method of a seed."""

    def __init__(self, worker: Worker, frozen: State) -> None:
        """Use ``worker``'s model; ``frozen`` are the frozen factors as the server knows them (its basis)."""
        federation = worker.federation
        index = federation.index
        self.worker = worker
        self.frozen = frozen
        chosen = panel(federation.config, federation.clients)
        self.panel = tuple(c for c in chosen if len(index.test[c]) or len(index.validation[c]))
        self.own_test = {client: index.test[client] for client in self.panel}
        self.validation = federation.bounded(_joined(index.validation), "validation")
        self.test = federation.bounded(_joined(index.unseen), "test")
        self.unseen = _grouped(self.test, index.unseen)

    def evaluate(self, strategy: FederatedStrategy | None, state: State, server_round: int) -> Evaluation:
        """Evaluate after ``server_round``. ``strategy=None`` means a stock Flower strategy: one global model."""
        kind = strategy.evaluation if strategy is not None else "global"
        if kind == "zero_shot":
            answer = self._zero_shot()
            if answer is not None:
                return answer
        if kind == "personal" or self.worker.model.private:
            travels = strategy is None or strategy.communicates
            return self._personal(state if travels else {}, strategy, server_round)
        self.load(state, strategy)
        found = self._summarise(self._statistics(self._rows()))
        if self.worker.federation.config.eval.personalise and self.own_test:
            correction = strategy.base_correction() if strategy is not None else {}
            tuned = personalised(
                self.worker, self.own_test, state, Frozen((None, None), self.frozen, correction), server_round
            )
            each = self._each(tuned)
            found = replace(found, personalised_clients=self._over(each), each={**found.each, "personalised": each})
        return found

    def _rows(self) -> np.ndarray:
        return np.concatenate([self.validation, *self.unseen.values(), *self.own_test.values()])

    def load(self, state: State, strategy: FederatedStrategy | None) -> None:
        """Put the global model into the worker: backbone, server's basis, shared state, base correction."""
        model = self.worker.model
        model.load({**self.worker.initial, **self.frozen, **state})
        model.set_base_correction(strategy.base_correction() if strategy is not None else {})

    def _zero_shot(self) -> Evaluation | None:
        federation = self.worker.federation
        rows = self._rows()
        statistics = federation.task.zero_shot(federation.rows, _joined(federation.index.train), rows)
        return None if statistics is None else self._summarise(statistics)

    def _personal(self, state: State, strategy: FederatedStrategy | None, server_round: int) -> Evaluation:
        """Every panel client with its own model: validation is the pool of their own validation rows."""
        index = self.worker.federation.index
        own_validation, own_test = [], {}
        for client, statistics in self._personal_statistics(state, strategy, server_round).items():
            validation, test = index.validation[client], index.test[client]
            parts = split_statistics(statistics, {"validation": len(validation), "test": len(test)})
            own_validation.append(parts["validation"] if len(validation) else {})
            own_test[client] = parts["test"] if len(test) else {}
        task = self.worker.federation.task
        metrics: dict[str, float] = {}
        held, tested = [part for part in own_validation if part], {c: part for c, part in own_test.items() if part}
        if held:
            metrics |= _prefixed("validation", task.metrics(joined_statistics(held)))
        if tested:
            metrics |= _prefixed("seen", task.metrics(joined_statistics(list(tested.values()))))
        seen = self._each(tested)
        return Evaluation(metrics, self._over(seen), each={"seen": seen})

    def _personal_statistics(
        self, state: State, strategy: FederatedStrategy | None, server_round: int
    ) -> dict[str, Statistics]:
        """Statistics of every panel client's validation rows, then test rows; clients with equal bases together.

        A client's tensors are read when its turn comes, so memory does not grow with the panel.
        """
        worker, federation, before = self.worker, self.worker.federation, server_round + 1
        correction = strategy.base_correction() if strategy is not None else {}
        common = Frozen((None, None), self.frozen, correction) if state else None
        groups: dict[Any, tuple[Frozen, list[str]]] = {}
        for client in self.panel:
            frozen = common or worker.frozen(worker.store.references(client, before))
            groups.setdefault(frozen.key, (frozen, []))[1].append(client)

        def state_of(client: str) -> State:
            return {**worker.personal(client, before)[0], **state}

        found: dict[str, Statistics] = {}
        for frozen, clients in groups.values():
            worker.trainer.hold(frozen)
            rows = {c: np.concatenate([federation.index.validation[c], federation.index.test[c]]) for c in clients}
            size = federation.config.eval.batch_size
            axis = worker.trainer.axis
            found |= statistics_of_clients(worker.model, axis, federation.task, federation.rows, state_of, rows, size)
        return {client: found[client] for client in self.panel}

    def _statistics(self, rows: np.ndarray) -> Statistics:
        federation = self.worker.federation
        size = federation.config.eval.batch_size
        return row_statistics(self.worker.model, federation.task, federation.rows, rows, size)

    def _summarise(self, statistics: Statistics) -> Evaluation:
        task = self.worker.federation.task
        sizes = {("validation", ""): len(self.validation)}
        sizes |= {("test", client): len(rows) for client, rows in self.unseen.items()}
        sizes |= {("seen", client): len(rows) for client, rows in self.own_test.items()}
        parts = split_statistics(statistics, sizes)
        metrics: dict[str, float] = {}
        of_clients: dict[str, dict[str, Statistics]] = {}
        for name in ("validation", "test", "seen"):
            groups = {client: part for (group, client), part in parts.items() if group == name and sizes[group, client]}
            if groups:
                metrics |= _prefixed(name, task.metrics(joined_statistics(list(groups.values()))))
                of_clients[name] = groups
        seen, unseen = (self._each(of_clients.get(name, {})) for name in ("seen", "test"))
        return Evaluation(metrics, self._over(seen), self._over(unseen), each={"seen": seen, "unseen": unseen})

    def _each(self, statistics: Mapping[str, Statistics]) -> EachClient:
        """Metrics of every client that has ``eval.min_rows`` rows."""
        rows = {client: len(next(iter(found.values()))) for client, found in statistics.items()}
        least = self.worker.federation.config.eval.min_rows
        enough = {client: found for client, found in statistics.items() if rows[client] >= least}
        metrics = each_client(self.worker.federation.task, enough)
        return {client: {"rows": rows[client], **found} for client, found in metrics.items()}

    def _over(self, each: EachClient) -> dict[str, float] | None:
        return client_metrics(self.worker.federation.task, each) if each else None


def _grouped(rows: np.ndarray, owners: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of ``rows`` that each owner has, where it has any."""
    groups = {client: np.intersect1d(rows, own, assume_unique=True) for client, own in owners.items()}
    return {client: found for client, found in groups.items() if len(found)}


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def _joined(rows_of: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([*rows_of.values(), np.zeros(0, dtype=np.int64)])
