"""The process of a deployed client: does the tasks of its SuperNode itself, one after the other.

Between two messages nothing is loaded again, and the app bundle that the server sends along is never unpacked: what
runs is the installed package.
"""

from __future__ import annotations

import logging
import threading
import time
from itertools import pairwise

import httpx
from flwr.common.constant import SubStatus
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlora.deploy.client import DeployedClient
from fedlora.deploy.runtime import TaskQueue

log = logging.getLogger("fedlora")


class Executor:
    """Answers the messages that arrive at a SuperNode, in the order in which they are complete.

    A message whose run has ended on its way never becomes complete: its thread waits for it, and for nobody else.
    """

    def __init__(self, queue: TaskQueue, client: DeployedClient) -> None:
        self.queue, self.client = queue, client
        self._one_at_a_time = threading.Lock()

    def start_next(self) -> bool:
        """Start the next task, if there is one; returns whether there was."""
        token = self.queue.claim()
        if token is not None:
            threading.Thread(target=self._do, args=(token,), name="task", daemon=True).start()
        return token is not None

    def _do(self, token: str) -> None:
        """A SuperNode that goes away meanwhile takes the task with it; the server hears of that from its SuperLink."""
        try:
            with self.queue.working(token) as connection:
                times = [time.perf_counter()]
                message, context, _, _ = pull_task_input(connection)
                with self._one_at_a_time:
                    times.append(time.perf_counter())
                    reply = self.client.handle(message)
                    times.append(time.perf_counter())
                    push_message(connection, reply, context)
                times.append(time.perf_counter())
                push_task_output(connection, context, SubStatus.COMPLETED, "")
                seconds = [later - earlier for earlier, later in pairwise(times)]
                kind = message.metadata.message_type
                log.info("%s: fetched in %.2f s, answered in %.2f s, handed over in %.2f s", kind, *seconds)
        except (httpx.HTTPError, RuntimeError) as error:
            log.warning("a message was lost: %s", error)
