"""The cohort engine: many clients in one batch over one frozen backbone, in this process.

Equal to the loop engine up to the order of sums. Clients that hold the same frozen tensors form cohorts of a size that
depends on the configuration and the data alone; what has no client axis is trained one client after the other.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedlora.adapters import LowRankAdapter, State
from fedlora.client import Job, Result, Worker
from fedlora.client_axis import ClientAxis
from fedlora.cohort import Member, train_cohort
from fedlora.errors import FedloraError
from fedlora.grid import ClientGrid, error_reply
from fedlora.schedule import learning_rate
from fedlora.seeding import numpy_rng
from fedlora.tasks import Task
from fedlora.training import steps_for

log = logging.getLogger("fedlora")


class CohortGrid(ClientGrid):
    """Trains the clients of a round cohort by cohort."""

    def __init__(self, worker: Worker, tokens: int, on_reply: Callable[[], None] = lambda: None) -> None:
        """Batch about ``tokens`` tokens a step; ``on_reply`` is called after each client, for progress."""
        super().__init__()
        self.worker = worker
        self.on_reply = on_reply
        self.axis = ClientAxis(worker.model)
        reason = reason_for_loop(worker, self.axis)
        if reason:
            log.info("engine=cohort trains one client after the other: %s", reason)
        self.size = 1 if reason else _cohort_size(worker, tokens)
        log.info("cohorts of up to %d clients", self.size)
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Open every request, train cohorts of equal frozen content, and answer in the order of the requests."""
        if self.size == 1:
            return [self._alone(request) for request in requests]
        replies: dict[str, Message] = {}
        groups: dict[tuple[str | None, ...], list[tuple[Job, State]]] = defaultdict(list)
        for request in requests:
            try:
                job = self.worker.open(request)
            except FedloraError as error:
                replies[request.metadata.message_id] = self._answered(error_reply(request, str(error)))
                continue
            frozen = (job.references.get("setup"), job.references.get("correction"))
            groups[frozen].append((job, self.worker.model.read(self.worker.model.trainable)))
        for members in groups.values():
            members.sort(key=lambda member: -self._steps(member[0]))  # who ends together trains together
            for start in range(0, len(members), self.size):
                for job, reply in self._train(members[start : start + self.size]):
                    replies[job.message.metadata.message_id] = self._answered(reply)
        return [replies[request.metadata.message_id] for request in requests]

    def _train(self, members: Sequence[tuple[Job, State]]) -> list[tuple[Job, Message]]:
        worker, config = self.worker, self.worker.federation.config
        worker.hold_frozen(members[0][0].references)
        cohort = [
            Member(
                state,
                worker.rows_of(job),
                numpy_rng(config.seed, "batches", job.server_round, job.client),
                partial(learning_rate, config.client, job.server_round, config.rounds),
                job.moments,
            )
            for job, state in members
        ]
        federation = worker.federation
        trained = train_cohort(worker.model, self.axis, federation.task, federation.rows, config.client, cohort)
        answers = []
        for (job, _), member, result in zip(members, cohort, trained, strict=True):
            if result.failed_step is not None:
                reason = (
                    f"the loss is {result.failed_loss} at local step {result.failed_step + 1} of client "
                    f"'{job.client}' in round {job.server_round}. Lower client.lr (now {config.client.lr})"
                )
                answers.append((job, error_reply(job.message, reason)))
                continue
            worker.model.load(result.state)
            answers.append((job, worker.close(job, Result(result.loss, len(member.rows), result.moments))))
        return answers

    def _alone(self, request: Message) -> Message:
        try:
            return self._answered(self.worker.handle(request))
        except FedloraError as error:
            return self._answered(error_reply(request, str(error)))

    def _steps(self, job: Job) -> int:
        settings = self.worker.federation.config.client
        whole = settings.batch_size * settings.grad_accumulation
        return steps_for(len(self.worker.rows_of(job)), whole, settings.local_epochs, settings.local_steps)

    def _answered(self, reply: Message) -> Message:
        self.on_reply()
        return reply


def reason_for_loop(worker: Worker, axis: ClientAxis) -> str | None:
    """Why the clients of this run cannot share a batch, or ``None``."""
    adapter, task = worker.federation.adapter, worker.federation.task
    if not isinstance(adapter, LowRankAdapter):
        return f"adapter {adapter.label} has no client axis"
    if adapter.sizes.dropout:
        return "adapter.dropout is drawn for each client"
    if axis.missing:
        return f"'{axis.missing[0]}' is in no linear layer"
    if type(task).row_losses is Task.row_losses:
        return f"task {type(task).__name__} gives no loss a row"
    return None


def _cohort_size(worker: Worker, tokens: int) -> int:
    """Clients of a cohort: as many as have ``tokens`` tokens in a step, on average."""
    federation = worker.federation
    rows = np.concatenate(list(federation.index.train.values()))
    each = federation.config.client.batch_size * float(federation.rows.lengths(rows).mean())
    return max(1, round(tokens / each))
