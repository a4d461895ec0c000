"""What a client would gain by training the global model further on its own rows (FedAvg with local fine-tuning)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlora.adapters import State
from fedlora.client import Worker
from fedlora.cohort import Member
from fedlora.errors import InputError
from fedlora.evaluation import statistics_of_clients
from fedlora.tasks import Statistics
from fedlora.trainer import Frozen
from simulations.engines.cohort import filled, step_tokens


def personalised(
    worker: Worker, rows: Mapping[str, np.ndarray], state: State, frozen: Frozen, server_round: int
) -> dict[str, Statistics]:
    """Statistics of each client's ``rows`` after a round of training the global model at that client.

    Args:
        worker: of this process; its client store is not touched.
        rows: the numbers of the rows to evaluate, for each client.
        state: the global shared tensors.
        frozen: what belongs to them: frozen factors and base correction.
        server_round: the round that has ended; the clients train as in the next one, or as in the last.

    Raises:
        InputError: a client's training failed.
    """
    worker.trainer.hold(frozen)
    following = min(server_round + 1, max(worker.federation.config.rounds, 1))  # a schedule ends with the last round
    members = {client: _member(worker, client, state, following) for client in rows}
    trained: dict[str, State] = {}
    for clients in _cohorts(worker, members):
        for client, result in zip(clients, worker.trainer.train([members[c] for c in clients]), strict=True):
            if result.failure:
                raise InputError(
                    f"eval.personalise: {result.failure} of client '{client}' after round {server_round}. Lower "
                    f"client.lr (now {worker.federation.config.client.lr}), or set eval.personalise=false."
                )
            trained[client] = {**members[client].state, **worker.federation.adapter.settled(result.state)}
    federation, model = worker.federation, worker.model
    size = federation.config.eval.batch_size
    return statistics_of_clients(
        model, worker.trainer.axis, federation.task, federation.rows, trained.__getitem__, dict(rows), size
    )


def _member(worker: Worker, client: str, state: State, server_round: int) -> Member:
    start = worker.narrowed({**worker.start_of(client), **state, **worker.model.own_of(client)}, client)
    keys = worker.model.trains(capability=worker.federation.capability(client))
    return worker.member(start, [client], server_round, f"personalise {client}", keys=keys)


def _cohorts(worker: Worker, members: Mapping[str, Member]) -> list[list[str]]:
    """Clients that train together: the same tensors, and about ``engine.tokens`` tokens in a step."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for client, member in members.items():
        groups.setdefault(member.keys, []).append(client)
    tokens = worker.federation.config.engine.tokens or 1

    def each(client: str) -> float:
        return step_tokens(worker.federation, members[client].rows)

    return [cohort for clients in groups.values() for cohort in filled(clients, each, tokens)]
