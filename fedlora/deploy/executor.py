"""The process of a deployed client: does the tasks of its SuperNode itself, one after the other.

Between two messages nothing is loaded again, and the app bundle that the server sends along is never unpacked: what
runs is the installed package.
"""

from __future__ import annotations

import logging

import httpx
from flwr.common.constant import SubStatus
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlora.deploy.client import DeployedClient
from fedlora.deploy.runtime import TaskQueue

log = logging.getLogger("fedlora")


def do_one(queue: TaskQueue, client: DeployedClient) -> bool:
    """Do the next task of ``queue``, if there is one; returns whether there was.

    A SuperNode that goes away meanwhile takes the task with it; the server hears of that from its SuperLink.
    """
    token = queue.claim()
    if token is None:
        return False
    with queue.working(token) as connection:
        try:
            message, context, _, _ = pull_task_input(connection)
            reply = client.handle(message)
            push_message(connection, reply, context)
            push_task_output(connection, context, SubStatus.COMPLETED, "")
        except (httpx.HTTPError, RuntimeError) as error:
            log.warning("a message was lost: %s", error)
    return True
