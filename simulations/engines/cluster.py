"""The Ray that actors run on: started here, or a cluster that is there already; and whether they fit on it."""

from __future__ import annotations

import logging
import math
import os
import socket
from typing import Any

from fedlora.config import EngineConfig
from fedlora.errors import InputError

CONNECT_SECONDS = 5.0
"""How long a cluster may take to answer; Ray itself would try for minutes."""
UNITS = 10_000
"""Ray counts a resource in steps of 1/10000, rounded to the nearest."""


def connect(engine: EngineConfig) -> bool:
    """Be connected to Ray: to the one this process uses already, to ``engine.address``, or to one started here.

    Returns:
        Whether the connection was made now, so that whoever asked for it has to end it.

    Raises:
        InputError: no cluster answers at that address.
    """
    import ray

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if engine.address is None:
        cores = max((engine.workers or 1) * (engine.threads or 1), os.cpu_count() or 1)
        ray.init("local", num_cpus=cores, include_dashboard=False, **options)
        return True
    try:
        _require_answer(engine.address)
        ray.init(engine.address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[0]
        raise InputError(
            f"engine.address = '{engine.address}': no Ray cluster answers there ({cause}). Start one with "
            "'ray start --head --port=6379' and name its host:6379, or set engine.address=null."
        ) from error
    return True


def require_cluster(engine: EngineConfig) -> None:
    """Find out at once whether the actors fit on the cluster at ``engine.address``.

    Raises:
        InputError: no cluster answers there, or it is too small.
    """
    import ray

    connected = connect(engine)
    try:
        gpus_of_a_worker(engine, ray.nodes())
    finally:
        if connected:
            ray.shutdown()


def gpus_of_a_worker(engine: EngineConfig, nodes: list[dict[str, Any]]) -> float:
    """The share of a GPU that each actor gets: none where the cluster has no GPU.

    Args:
        engine: says how many actors, and how many cores each.
        nodes: as Ray lists them.

    Raises:
        InputError: the actors do not fit on the nodes.
    """
    workers, threads = engine.workers or 1, engine.threads or 1
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    sizes = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive]
    gpus = sum(gpus for _, gpus in sizes)
    on_each = math.ceil(workers / gpus) if gpus else 0
    room = sum(min(cores // threads, held * on_each) if gpus else cores // threads for cores, held in sizes)
    if workers > room:
        listed = ", ".join(f"{cores} cores" + (f" and {held} GPUs" if gpus else "") for cores, held in sizes)
        raise InputError(
            f"engine.workers = {workers} with engine.threads = {threads} do not fit: Ray has {len(sizes)} node(s) "
            f"({listed}) with room for {room}. Lower one of them."
        )
    return gpu_share(workers, gpus)


def gpu_share(workers: int, gpus: int) -> float:
    """GPUs of one actor, so that ``workers`` of them fit on ``gpus``: 1, a fraction, or 0 where there is none."""
    return 0.0 if gpus == 0 else UNITS // math.ceil(workers / gpus) / UNITS


def _require_answer(address: str) -> None:
    """Raise an ``OSError`` or ``ValueError`` unless a gRPC server answers there, as the head of a cluster does."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdigit():
        raise ValueError("it is 'auto' or host:port, of the cluster's head")
    with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
        pass
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            raise TimeoutError("what listens there is not Ray") from None
