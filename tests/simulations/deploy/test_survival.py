"""A deployed run survives the end of any of its processes, and ends with the bits of the simulation."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.simulations.deploy.conftest import MakeDeployment
from tests.simulations.deploy.helpers import Deployment, Running
from tests.simulations.test_rounds import rounds_of

pytestmark = pytest.mark.slow


def rounds_done(deployment: Deployment) -> int:
    """How many rounds, the start among them, are written down."""
    path = deployment.run / "rounds.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def assert_same_bits(deployment: Deployment, simulated: Path) -> None:
    loop, deployed = (load_file(f / "adapter/fedlora_state.safetensors") for f in (simulated / "run", deployment.run))
    for key, value in loop.items():
        assert value.equal(deployed[key]), key
    assert [r["failures"] for r in rounds_of(deployment.run)] == [{}] * 4


def child_of(running: Running, module: str) -> psutil.Process:
    """Flower's process under one of ours."""
    (found,) = [c for c in psutil.Process(running.process.pid).children() if module in c.cmdline()]
    return found


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_a_run_survives_a_superlink_that_is_killed(make: MakeDeployment, simulated: Path, encrypted: bool) -> None:
    deployment = make(encrypted=encrypted)
    server, _ = deployment.serve(), deployment.join_all()
    server.wait_until(lambda: rounds_done(deployment) == 2)
    os.kill(child_of(server, "simulations.deploy.superlink").pid, signal.SIGKILL)
    assert server.wait() == 0, server.said
    assert_same_bits(deployment, simulated)


def test_a_run_is_resumed_after_its_server_was_killed(make: MakeDeployment, simulated: Path) -> None:
    deployment = make(encrypted=True)
    server, _ = deployment.serve(), deployment.join_all()
    server.wait_until(lambda: rounds_done(deployment) == 2)
    link = child_of(server, "simulations.deploy.superlink")
    server.kill()
    link.wait(30)  # it ends with its parent
    again = deployment.resume()
    assert again.wait() == 0, again.said
    assert_same_bits(deployment, simulated)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_a_client_that_is_killed_rejoins_with_its_id(make: MakeDeployment, simulated: Path, encrypted: bool) -> None:
    deployment = make(encrypted=encrypted)
    server, clients = deployment.serve(), deployment.join_all()
    server.wait_until(lambda: rounds_done(deployment) == 2)
    name, client = next(iter(clients.items()))
    client.kill()
    deployment.join(name)
    assert server.wait(400) == 0, server.said
    assert len(rounds_of(deployment.run)) == 4


def test_a_supernode_that_is_killed_is_started_again(make: MakeDeployment, simulated: Path) -> None:
    deployment = make()
    server, clients = deployment.serve(), deployment.join_all()
    server.wait_until(lambda: rounds_done(deployment) == 2)
    client = next(iter(clients.values()))
    os.kill(child_of(client, "fedlora.deploy.supernode").pid, signal.SIGKILL)
    assert server.wait(400) == 0, server.said
    assert client.process.poll() is None, client.said


def test_a_full_disk_ends_the_run_and_it_is_resumed(make: MakeDeployment, simulated: Path) -> None:
    deployment = make()
    server, _ = deployment.serve(), deployment.join_all()
    server.wait_until(lambda: rounds_done(deployment) == 2)
    psutil.Process(server.process.pid).rlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    assert server.wait() == 1, server.said
    assert not (deployment.run / "summary.json").exists()
    again = deployment.resume()
    assert again.wait() == 0, again.said
    assert_same_bits(deployment, simulated)


def test_two_runs_at_once_do_not_meet(make: MakeDeployment, simulated: Path, tmp_path: Path) -> None:
    one, two = make(), make()
    two.folder = tmp_path / "two"
    servers = [one.serve(), two.serve()]
    for deployment in (one, two):
        deployment.join_all()
    for server in servers:
        assert server.wait(400) == 0, server.said
    assert_same_bits(one, simulated)
    assert_same_bits(two, simulated)
