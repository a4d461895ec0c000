"""The cohort engine: many clients in one batch over one frozen backbone.

Equal to the loop engine up to the order of sums. Clients that hold the same frozen tensors form cohorts whose members
depend on the configuration and the data alone, not on who trains them: this process or any number of Ray actors.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedlora.client import Job, Worker, asks_for_training
from fedlora.cohort import Trained, member_steps
from fedlora.errors import FedloraError
from fedlora.federation import Federation
from fedlora.grid import ClientGrid, error_reply
from simulations.engines.executor import Executor, Work

log = logging.getLogger("fedlora")
Member = TypeVar("Member")


class CohortGrid(ClientGrid):
    """Trains the clients of a round cohort by cohort."""

    def __init__(
        self,
        worker: Worker,
        executor: Executor,
        tokens: int,
        on_reply: Callable[[], None] = lambda: None,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Let ``executor`` train cohorts with about ``tokens`` tokens a step (0: one client each).

        ``on_reply`` is called after each client, for progress; ``on_tokens`` when ``tokens`` had to be lowered because
        a cohort did not fit the memory.
        """
        super().__init__()
        self.worker = worker
        self.executor = executor
        self.on_reply, self.on_tokens = on_reply, on_tokens
        self.tokens = tokens
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Open every request, train cohorts of equal frozen content, and answer in the order of the requests."""
        replies: dict[str, Message] = {}
        jobs: list[Job] = []
        for request in requests:
            try:
                if asks_for_training(request):
                    jobs.append(self.worker.open(request))
                else:
                    replies[request.metadata.message_id] = self._answered(self.worker.handle(request))
            except FedloraError as error:
                replies[request.metadata.message_id] = self._answered(error_reply(request, str(error)))
        cohorts, halved = self.cohorts(jobs), self.executor.halved
        for number, trained in self.executor.run([self._work(cohort) for cohort in cohorts]):
            for job, result in zip(cohorts[number], trained, strict=True):
                replies[job.message.metadata.message_id] = self._answered(self._closed(job, result))
        if self.executor.halved > halved and self.tokens > 1:
            self.tokens //= 2
            log.warning("memory ran out: from now on engine.tokens = %d", self.tokens)
            self.on_tokens(self.tokens)
        return [replies[request.metadata.message_id] for request in requests]

    def cohorts(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Jobs that train together: equal frozen content, about equally many steps, ``tokens`` tokens a step."""
        groups: dict[tuple[Any, ...], list[Job]] = defaultdict(list)
        for job in jobs:
            groups[job.references.get("setup"), job.references.get("correction"), job.member.keys].append(job)
        cohorts: list[list[Job]] = []
        settings = self.worker.federation.config.client
        for members in groups.values():
            members.sort(key=lambda job: -member_steps(job.member, settings))  # who ends together trains together
            cohorts += filled(members, self._step_tokens, self.tokens)
        return cohorts

    def _work(self, cohort: Sequence[Job]) -> Work:
        settings = self.worker.federation.config.client
        cost = sum(self._step_tokens(job) * member_steps(job.member, settings) for job in cohort)
        return Work(self.worker.frozen(cohort[0].references), [job.member for job in cohort], cost)

    def _step_tokens(self, job: Job) -> float:
        return step_tokens(self.worker.federation, job.member.rows)

    def _closed(self, job: Job, trained: Trained) -> Message:
        if trained.failure and not trained.failure.startswith("the loss is"):
            return error_reply(job.message, trained.failure)  # no learning rate would help
        try:
            return self.worker.close(job, trained)
        except FedloraError as error:
            return error_reply(job.message, str(error))

    def _answered(self, reply: Message) -> Message:
        self.on_reply()
        return reply


def step_tokens(federation: Federation, rows: np.ndarray) -> float:
    """Tokens of a step of the client that has ``rows``, on average."""
    return min(federation.config.client.batch_size, len(rows)) * float(federation.rows.lengths(rows).mean())


def filled(members: Sequence[Member], each: Callable[[Member], float], tokens: int) -> list[list[Member]]:
    """``members`` in their order as cohorts of about ``tokens`` tokens a step, ``each`` of one; never an empty one."""
    cohorts: list[list[Member]] = []
    room = 0.0
    for position, member in enumerate(members):
        size = each(member)
        if position == 0 or room < size:
            cohorts.append([])
            room = max(float(tokens), size)
        cohorts[-1].append(member)
        room -= size
    return cohorts
