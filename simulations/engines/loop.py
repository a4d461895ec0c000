"""The loop engine: one client after the other in this process. The oracle that every other engine must equal."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedlora.grid import ClientGrid


class LoopGrid(ClientGrid):
    """Calls the ClientApp for every message, here and now."""

    def __init__(self, app: ClientApp, on_reply: Callable[[], None] = lambda: None) -> None:
        """Use ``app`` for every client; ``on_reply`` is called after each of them, for progress."""
        super().__init__()
        self.app = app
        self.on_reply = on_reply
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        """Handle the requests in order."""
        return [self._handle(request) for request in requests]

    def _handle(self, request: Message) -> Message:
        context = Context(
            run_id=1, node_id=request.metadata.dst_node_id, node_config={}, state=RecordDict(), run_config={}
        )
        reply = self.app(request, context)
        self.on_reply()
        return reply
