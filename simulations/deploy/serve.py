"""``fedlora serve``: the server side of a deployment, from the same configuration as a simulation."""

from __future__ import annotations

import json
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedlora.client import Worker
from fedlora.config import Config, EngineConfig
from fedlora.deploy.datasets import server_dataset
from fedlora.deploy.keys import registered_key
from fedlora.deploy.terms import terms_of
from fedlora.errors import InputError
from fedlora.federation import Federation, task_of
from fedlora.grid import ClientGrid
from fedlora.store import write_atomically
from simulations.deploy.grid import DeployedGrid
from simulations.deploy.superlink import SuperLink
from simulations.messages import say
from simulations.run_folder import RunFolder
from simulations.simulate import begin, go_on
from strategies.build import build_strategy

log = logging.getLogger("fedlora")
SERVED = "server/serving.json"
"""In a run folder: its id, and how it is served."""


@dataclass(frozen=True)
class Serving:
    """How a run is served.

    Attributes:
        host: address that the server listens on.
        port: that it listens on.
        certificates: folder of ``ca.crt``, ``server.pem``, ``server.key`` and ``clients/<client id>.pub``; ``None``: no
            encryption, and everybody is let in.
        clients: who may take part; with ``certificates`` whose keys are there.
        least: clients that must be connected before the first round.
        run: id of the run, drawn when it is first served.
    """

    host: str
    port: int
    certificates: Path | None
    clients: tuple[str, ...]
    least: int | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def keys(self) -> dict[str, bytes]:
        """The public key of every client, by its id."""
        if self.certificates is None:
            return {}
        return {client: registered_key(self.certificates / "clients" / f"{client}.pub") for client in self.clients}

    def text(self) -> str:
        """As JSON."""
        certificates = None if self.certificates is None else str(self.certificates.resolve())
        return json.dumps({**asdict(self), "certificates": certificates})

    @classmethod
    def read(cls, path: Path) -> Serving:
        """From a file of :meth:`text`."""
        values = json.loads(path.read_text())
        certificates = values["certificates"] and Path(values["certificates"])
        return cls(**{**values, "certificates": certificates, "clients": tuple(values["clients"])})


def serve(config: Config, run_dir: Path, serving: Serving, *, merged: bool = False) -> dict[str, Any]:
    """Run ``config`` with real clients in the new folder ``run_dir`` and return the summary.

    Raises:
        InputError: the configuration, the server's rows or its certificates cannot work. Nothing is left behind then.
        FedloraError: the run failed; ``fedlora resume`` goes on from its checkpoint.
    """
    folder = RunFolder(run_dir)
    folder.require_new()
    worker = server_worker(config.model_copy(update={"run_dir": str(folder.path)}), serving, folder)
    return begin(worker, folder, merged=merged, on_engine=_Deployed(serving, folder))


def serve_again(run_dir: Path, *, merged: bool = False) -> dict[str, Any]:
    """Finish the deployed run in ``run_dir`` from its newest checkpoint, served as it was before.

    Raises:
        InputError: there is no run, or it was started without checkpoints.
    """
    folder = RunFolder(run_dir)
    summary = folder.read_summary()
    if summary is not None:
        return summary
    serving = Serving.read(folder.path / SERVED)
    worker = server_worker(folder.read_config(), serving, folder)
    return go_on(worker, folder, merged=merged, on_engine=_Deployed(serving, folder))


def server_worker(config: Config, serving: Serving, folder: RunFolder) -> Worker:
    """A worker that knows the clients by name only, and has the server's own rows."""
    engine = EngineConfig(name="deploy", workers=0, threads=config.engine.threads, packing=config.engine.packing)
    update: dict[str, Any] = {"engine": engine}
    if config.privacy.secret_cohort and config.privacy.secret is None:
        update["privacy"] = config.privacy.model_copy(update={"secret": secrets.randbits(63)})
    config = config.model_copy(update=update)
    if config.faults.name != "none":
        raise InputError(f"faults={config.faults.name} makes faults in a simulation; real clients have their own.")
    if not serving.clients:
        raise InputError("There are no clients: put their public keys into the folder of certificates, under clients/.")
    if config.adapter.get("groups") == "natural":
        raise InputError("adapter.groups=natural needs the groups of all clients in one table: set adapter.groups=4.")
    federation = Federation(config, server_dataset(config, task_of(config), serving.clients))
    if federation.differences:
        raise InputError(f"Clients that differ in {', '.join(federation.differences)} exist in simulations only.")
    worker = Worker(federation, folder.store)
    strategy = build_strategy(config.strategy, worker.model)
    if not getattr(strategy, "communicates", True):
        raise InputError(
            f"{type(strategy).__name__} has no clients to talk to: it is a baseline for 'fedlora simulate'. Choose "
            "another method."
        )
    return worker


def serve_on(grid: Grid, config: Config, run_dir: Path, serving: Serving) -> dict[str, Any]:
    """Run ``config`` over a grid of Flower's own, as ``flwr run`` gives it, in the new folder ``run_dir``.

    Raises:
        InputError: the configuration or the server's rows cannot work.
        FedloraError: the run failed.
    """
    folder = RunFolder(run_dir)
    folder.require_new()
    worker = server_worker(config.model_copy(update={"run_dir": str(folder.path)}), serving, folder)

    def on_engine(
        worker: Worker,
        server: Callable[[ClientGrid], None],
        on_reply: Callable[[], None],
        on_change: Callable[..., None],
        pools: Any,
    ) -> None:
        server(connected(grid, worker, serving, on_reply))

    return begin(worker, folder, on_engine=on_engine)


class _Deployed:
    """The engine of a deployed run, as :func:`simulations.simulate.begin` calls it."""

    def __init__(self, serving: Serving, folder: RunFolder) -> None:
        self.serving, self.folder = serving, folder

    def __call__(
        self,
        worker: Worker,
        server: Callable[[ClientGrid], None],
        on_reply: Callable[[], None],
        on_change: Callable[..., None],
        pools: Any,
    ) -> None:
        serving = self.serving
        link = SuperLink(serving.host, serving.port, self.folder.path / "server", serving.certificates)
        try:
            write_atomically(self.folder.path / SERVED, serving.text())
            link.register(serving.keys())
            with grid_of(link) as flower:
                server(connected(flower, worker, serving, on_reply))
        finally:
            link.stop()


def connected(flower: Grid, worker: Worker, serving: Serving, on_reply: Callable[[], None]) -> DeployedGrid:
    """The engine over Flower's grid, once enough clients are connected."""
    terms = terms_of(worker, serving.run)
    log.info("terms of the run: %s", terms.fingerprint)
    grid = DeployedGrid(flower, terms, serving.clients, serving.certificates is not None, on_reply)
    wait_for(grid, serving.least or len(serving.clients))
    return grid


def wait_for(grid: DeployedGrid, least: int) -> None:
    """Wait until so many clients are connected, and say for whom."""
    told = -1
    while (there := len(grid.connected())) < least:
        if there != told:
            say("waiting", f"{there} of {least} clients are connected", "bold")
            told = there
        time.sleep(1.0)


@contextmanager
def grid_of(link: SuperLink) -> Iterator[HttpGrid]:
    """Start a run of Flower, be its server side, and end it."""
    token = link.start_run()
    insecure = link.root_certificates is None
    grid = HttpGrid(link.address, insecure, link.root_certificates, token=token)
    client = grid._runtime_client
    sender = HeartbeatSender(make_task_heartbeat_fn_http(client))
    sender.start()
    status, details = SubStatus.FAILED, "the server has stopped"
    try:
        found = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id = found.task_id
        TaskIdentity.run_id = found.run.run_id
        TaskIdentity.node_id = found.context.node_id
        grid.set_run(run_from_proto(found.run))
        context_from_proto(found.context)
        yield grid
        status, details = SubStatus.COMPLETED, ""
    finally:
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        sender.stop()
        grid.close()
