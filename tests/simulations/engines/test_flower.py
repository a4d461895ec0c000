"""Flower's simulation may end under a run: then the run ends too."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.errors import FedloraError
from simulations.engines.flower import FlowerGrid
from tests.fedlora.helpers import request


class Silent(Grid):
    """A grid of two nodes that never answer, as Flower's is once its simulation has crashed."""

    def get_node_ids(self) -> Iterable[int]:
        return [1, 2]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [str(uuid4()) for _ in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return []

    def _not_used(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("the engine does not call it")

    run = property(_not_used)
    set_run = create_message = send_and_receive = _not_used


def test_no_reply_is_waited_for_once_the_simulation_has_ended() -> None:
    ended = threading.Event()
    grid = FlowerGrid(Silent(), 2, ended)
    timer = threading.Timer(0.2, ended.set)
    timer.start()
    requests = [request(client) for client in (5, 6, 7)]
    with pytest.raises(FedloraError, match="ended before 3 replies"):
        grid.exchange(requests, timeout=30.0)
    timer.join()
