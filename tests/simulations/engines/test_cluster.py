"""Actors on a cluster of two nodes; and what cannot work is said at once, before there is a run folder."""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import EngineConfig
from fedlora.errors import InputError
from simulations.engines.cluster import UNITS, gpu_share, gpus_of_a_worker
from simulations.simulate import start
from tests.conftest import Compose
from tests.simulations.engines.conftest import forget_processes
from tests.simulations.test_cli import fedlora
from tests.simulations.test_resume import assert_same_run

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves files open


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with one core each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()
    forget_processes()


def test_workers_on_two_nodes_give_the_same_bits_as_none(tiny: Compose, tmp_path: Path, two_nodes: str) -> None:
    settings = ["engine=cohort", "engine.tokens=150", "engine.threads=1", "method=fedex", "rounds=2"]
    start(tiny(*settings, "engine.workers=2", f"engine.address={two_nodes}"), tmp_path / "cluster")
    assert len(set(re.findall(r"'node': '(\w+)'", (tmp_path / "cluster" / "log.txt").read_text()))) == 2
    start(tiny(*settings, "engine.workers=0"), tmp_path / "here")
    assert_same_run(tmp_path / "here", tmp_path / "cluster")


@pytest.mark.slow
def test_flower_does_not_join_a_cluster_that_happens_to_run_here(
    tiny_overrides: list[str], tmp_path: Path, two_nodes: str
) -> None:
    settings = [*tiny_overrides, "adapter.rank=4", "engine=flower", "rounds=1"]
    process = fedlora("simulate", *settings, f"run_dir={tmp_path / 'run'}")
    assert process.returncode == 0, process.stderr


def refused(tiny: Compose, folder: Path, *settings: str) -> str:
    with pytest.raises(InputError) as caught:
        start(tiny("engine=cohort", "engine.tokens=100", "engine.threads=1", *settings), folder)
    assert not folder.exists()
    return str(caught.value)


def test_more_workers_than_fit_a_cluster_are_refused(tiny: Compose, tmp_path: Path, two_nodes: str) -> None:
    import ray

    said = refused(tiny, tmp_path / "run", "engine.workers=3", f"engine.address={two_nodes}")
    assert "room for 2. Lower one of them" in said
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:{free}", "nowhere.invalid:6379", "localhost", "ray://localhost:10001"])
def test_a_wrong_address_is_refused(tiny: Compose, tmp_path: Path, address: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(free=free.getsockname()[1])
    said = refused(tiny, tmp_path / "run", "engine.workers=2", f'engine.address="{address}"')
    assert f"engine.address = '{address}': no Ray cluster answers there" in said
    assert "ray start --head" in said


@pytest.mark.timeout(60)  # Ray alone tries for minutes
def test_something_that_listens_but_is_not_ray_is_refused(tiny: Compose, tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        said = refused(tiny, tmp_path / "run", "engine.workers=2", f"engine.address={address}")
    assert "what listens there is not Ray" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["engine.address=auto"], "needs engine.workers"),
        (["engine=flower", "engine.workers=0"], "set engine.workers to 1 or more"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(
    tiny: Compose, tmp_path: Path, settings: list[str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        start(tiny(*(settings if "flower" in settings[0] else ["engine=cohort", *settings])), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def node(cores: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cores, "GPU": gpus} if gpus else {"CPU": cores}}


@given(st.integers(1, 500), st.integers(1, 64))
def test_the_shares_of_gpus_always_fit(workers: int, gpus: int) -> None:
    share = gpu_share(workers, gpus)
    units = round(share * UNITS)  # as Ray counts them
    assert share == units / UNITS > 0
    assert UNITS // units * gpus >= workers
    assert share == 1 or math.ceil(workers / gpus) > 1


@pytest.mark.parametrize(
    ("workers", "threads", "nodes", "share"),
    [
        (4, 1, [node(4)], 0.0),
        (2, 2, [node(3), node(3)], 0.0),
        (3, 2, [node(3), node(3)], None),
        (2, 1, [node(1), node(1, alive=False)], None),
        (2, 1, [node(4, 2)], 1.0),
        (4, 1, [node(8, 1), node(8, 1)], 0.5),
        (2, 1, [node(8), node(1, 1)], None),
        (3, 1, [node(8), node(8, 1)], 0.3333),
    ],
)
def test_workers_are_refused_exactly_where_a_node_has_no_room(
    workers: int, threads: int, nodes: list[dict[str, Any]], share: float | None
) -> None:
    engine = EngineConfig(name="cohort", workers=workers, threads=threads)
    if share is None:
        with pytest.raises(InputError, match="do not fit"):
            gpus_of_a_worker(engine, nodes)
    else:
        assert gpus_of_a_worker(engine, nodes) == share
