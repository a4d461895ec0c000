"""The flower engine: Flower's own simulation on Ray, with the same server code and the same ClientApp.

Slower than the others (Flower's queue costs milliseconds a message); it is here to show that nothing depends on our
engine. Logical messages travel through a few virtual SuperNodes, one message each.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.errors import FedloraError
from fedlora.grid import ClientGrid, error_reply


class FlowerGrid(ClientGrid):
    """Sends each logical message to one of Flower's virtual nodes and names the reply after the logical client.

    Args:
        grid: Flower's own, in memory.
        nodes: how many virtual SuperNodes there are.
        ended: set when Flower's simulation is over, so that nothing waits for a reply that can no longer come.
        on_reply: called after each client.
    """

    def __init__(
        self, grid: Grid, nodes: int, ended: threading.Event, on_reply: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self.grid = grid
        self.ended = ended
        self.on_reply = on_reply
        self._nodes = _wait_for_nodes(grid, nodes)

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Spread the requests over the nodes and wait for all replies, whatever the ``timeout``.

        Raises:
            FedloraError: Flower's simulation ended meanwhile.
        """
        physical: dict[str, Message] = {}
        for number, request in enumerate(requests):
            node = self._nodes[number % len(self._nodes)]
            message = Message(request.content, node, request.metadata.message_type)
            (identifier,) = self.grid.push_messages([message])
            physical[identifier] = request
        replies: list[Message] = []
        while physical:
            for reply in self.grid.pull_messages(list(physical)):
                request = physical.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    replies.append(error_reply(request, _cause(reply.error.reason or "")))
                else:
                    replies.append(Message(reply.content, reply_to=request))
                self.on_reply()
            if self.ended.wait(0.02) and physical:
                raise FedloraError(f"engine=flower: the simulation ended before {len(physical)} replies had come")
        return replies


def run_on_flower(server: Callable[[Grid, threading.Event], None], app: ClientApp, workers: int, threads: int) -> None:
    """Run ``server`` as a ServerApp beside ``workers`` Ray actors that execute ``app``.

    Args:
        server: gets Flower's grid, and the event that is set once the simulation behind it has ended.
        app: executes in the actors.
        workers: number of actors.
        threads: of each actor.

    Raises:
        FedloraError: whatever ``server`` raised (Flower itself only logs it), or Ray could not run here.
    """
    from flwr.simulation import run_simulation

    server_app = ServerApp()
    outcome: list[BaseException] = []
    ended = threading.Event()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            server(grid, ended)
        except BaseException as error:
            outcome.append(error)

    os.environ["OMP_NUM_THREADS"] = str(threads)
    # "local": without an address Ray joins whichever cluster was last started on this machine, alive or not.
    ray_options = {"address": "local", "num_cpus": workers, "include_dashboard": False, "log_to_driver": False}
    quiet = logging.getLogger("flwr")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_simulation(
                server_app,
                app,
                num_supernodes=workers,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                    "init_args": ray_options,
                },
            )
    except RuntimeError as error:
        raise FedloraError(f"engine=flower: Flower's simulation did not run on Ray ({_first_cause(error)})") from error
    finally:
        ended.set()
        quiet.setLevel(level)
    if outcome:
        raise outcome[0]


def _wait_for_nodes(grid: Grid, count: int, seconds: float = 120.0) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= count:
            return nodes[:count]
        time.sleep(0.1)
    raise FedloraError(f"engine=flower: fewer than {count} virtual SuperNodes registered within {seconds:.0f} s")


def _first_cause(error: BaseException) -> str:
    """What an error was first raised from, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _cause(reason: str) -> str:
    """The last exception line of a reason that quotes a remote traceback."""
    lines = [line.strip() for line in reason.replace("\\n", "\n").splitlines() if line.strip()]
    causes = [line for line in lines if "Error" in line]
    return (causes or lines or ["unknown error"])[-1]
