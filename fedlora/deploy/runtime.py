"""Flower's Runtime API from our side: claim a task of a SuperLink or SuperNode, and say that it is being worked on.

Flower itself starts a new process for every task and runs in it the code of the app bundle that came over the network.
Here the process that claims a task also does it, with the installed package, and the bundle is never unpacked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.runtime.tracing import RuntimeTracingInterceptor

CLAIMS = frozenset({"/flwr.proto.Runtime/AcquireTask"})
PATIENCE = 60.0
"""Seconds in which a connection to a process of this machine is tried again, before a task is given up."""
Kind = Literal["flwr-serverapp", "flwr-clientapp"]


def quiet_flower() -> None:
    """Flower sends nothing about its use, and does not ask for updates; before it is imported or started."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"


class TaskQueue:
    """The tasks of one kind at a SuperLink or a SuperNode of this machine."""

    def __init__(self, address: str, kind: Kind, secret: bytes, root_certificates: bytes | None = None) -> None:
        """Talk to the Runtime API at ``address``, in plain HTTP where there are no ``root_certificates``."""
        self.address, self.kind, self.root_certificates = address, kind, root_certificates
        signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=CLAIMS)
        self._client = self._connect("SuperExec", signed, patience=0.0)

    def claim(self) -> str | None:
        """The token of a task that nobody else works on; ``None`` while there is none, or nobody answers."""
        with suppress(httpx.TransportError):
            answer = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[self.kind]))
            if answer.HasField("task") and answer.token:
                return answer.token
        return None

    @contextmanager
    def working(self, token: str) -> Iterator[RuntimeHttpClient]:
        """A client for the task of ``token``; signs of life are sent as long as it is open."""
        client = self._connect(self.kind, RuntimeTokenHttpInterceptor(token), patience=PATIENCE)
        sender = HeartbeatSender(lambda: sign_of_life(client))
        sender.start()
        try:
            yield client
        finally:
            sender.stop()
            client.close()

    def _connect(self, name: str, *interceptors: Any, patience: float) -> RuntimeHttpClient:
        retry = RetryInvoker(
            lambda: exponential(max_delay=5),
            recoverable_exceptions=httpx.TransportError,
            max_tries=None,
            max_time=patience,
        )
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.root_certificates is None,
            root_certificates=self.root_certificates,
            interceptors=[
                RuntimeTracingInterceptor(),
                RuntimeVersionHttpInterceptor(component_name=name),
                *interceptors,
            ],
            retry_invoker=retry,
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def sign_of_life(client: RuntimeHttpClient) -> bool:
    """Send one. Whoever no longer wants to hear of the task says so when its result is pushed."""
    with suppress(httpx.HTTPError):
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    return True
