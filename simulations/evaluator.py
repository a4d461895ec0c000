"""Evaluate the state of a run: global validation and test sets, and every panel client on its own test rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedlora.adapters import State
from fedlora.client import Worker
from fedlora.evaluation import client_metrics, row_statistics, split_statistics
from fedlora.tasks import Statistics
from simulations.sampler import panel
from strategies.base import FederatedStrategy


@dataclass(frozen=True)
class Evaluation:
    """Numbers of one evaluation.

    Attributes:
        metrics: ``validation_<name>`` (rows of training clients) and ``test_<name>`` (whole unseen clients; absent
            where no single model exists).
        clients: mean, std, worst_decile and worst of the main metric over seen clients' own test rows.
    """

    metrics: dict[str, float]
    clients: dict[str, float] | None


class Evaluator:
    """Knows which rows are evaluated; the same rows for every method of a seed."""

    def __init__(self, worker: Worker, frozen: State) -> None:
        """Use ``worker``'s model; ``frozen`` are the frozen factors as the server knows them (its basis)."""
        federation = worker.federation
        index = federation.index
        self.worker = worker
        self.frozen = frozen
        self.panel = tuple(c for c in panel(federation.config, federation.clients) if len(index.test[c]))
        self.own_test = {client: index.test[client] for client in self.panel}
        self.validation = federation.bounded(_joined(index.validation), "validation")
        self.test = federation.bounded(_joined(index.unseen), "test")

    def evaluate(self, strategy: FederatedStrategy | None, state: State, server_round: int) -> Evaluation:
        """Evaluate after ``server_round``. ``strategy=None`` means a stock Flower strategy: one global model."""
        kind = strategy.evaluation if strategy is not None else "global"
        if kind == "zero_shot":
            answer = self._zero_shot()
            if answer is not None:
                return answer
        if kind == "personal" or self.worker.model.private:
            return self._personal(state if kind != "personal" else {}, strategy, server_round)
        self.load(state, strategy)
        rows = np.concatenate([self.validation, self.test, *self.own_test.values()])
        return self._summarise(self._statistics(rows))

    def load(self, state: State, strategy: FederatedStrategy | None) -> None:
        """Put the global model into the worker: backbone, server's basis, shared state, base correction."""
        model = self.worker.model
        model.load({**self.worker.initial, **self.frozen, **state})
        model.set_base_correction(strategy.base_correction() if strategy is not None else {})

    def _zero_shot(self) -> Evaluation | None:
        federation = self.worker.federation
        rows = np.concatenate([self.validation, self.test, *self.own_test.values()])
        statistics = federation.task.zero_shot(federation.rows, _joined(federation.index.train), rows)
        return None if statistics is None else self._summarise(statistics)

    def _personal(self, state: State, strategy: FederatedStrategy | None, server_round: int) -> Evaluation:
        """Every panel client with its own model: validation is the pool of their own validation rows."""
        index = self.worker.federation.index
        own_validation, own_test = [], {}
        for client in self.panel:
            self.worker.load_personal(client, server_round + 1)
            if state:
                self.worker.model.load(state)
                self.worker.model.set_base_correction(strategy.base_correction() if strategy is not None else {})
            validation, test = index.validation[client], index.test[client]
            parts = split_statistics(
                self._statistics(np.concatenate([validation, test])), {"validation": len(validation), "test": len(test)}
            )
            own_validation.append(parts["validation"])
            own_test[client] = parts["test"]
        pooled = {name: np.concatenate([part[name] for part in own_validation]) for name in own_validation[0]}
        task = self.worker.federation.task
        return Evaluation(_prefixed("validation", task.metrics(pooled)), client_metrics(task, own_test))

    def _statistics(self, rows: np.ndarray) -> Statistics:
        federation = self.worker.federation
        size = federation.config.eval.batch_size
        return row_statistics(self.worker.model, federation.task, federation.rows, rows, size)

    def _summarise(self, statistics: Statistics) -> Evaluation:
        task = self.worker.federation.task
        sizes = {("set", "validation"): len(self.validation), ("set", "test"): len(self.test)}
        sizes |= {("client", client): len(rows) for client, rows in self.own_test.items()}
        parts = split_statistics(statistics, sizes)
        metrics: dict[str, float] = {}
        for name in ("validation", "test"):
            if sizes["set", name]:
                metrics |= _prefixed(name, task.metrics(parts["set", name]))
        clients = {client: parts["client", client] for client in self.own_test}
        return Evaluation(metrics, client_metrics(task, clients) if clients else None)


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def _joined(rows_of: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([*rows_of.values(), np.zeros(0, dtype=np.int64)])
