"""A real client that lies costs its own update and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulations.deploy import liar
from tests.simulations.deploy.conftest import MakeDeployment
from tests.simulations.deploy.helpers import ENVIRONMENT
from tests.simulations.test_rounds import rounds_of

pytestmark = pytest.mark.slow


def test_a_client_that_lies_costs_its_own_update_only(make: MakeDeployment, tmp_path: Path) -> None:
    deployment = make(f"rounds={len(liar.LIES)}")
    name = deployment.clients[0]
    server = deployment.serve()
    for honest in deployment.clients[1:]:
        deployment.join(honest)
    arguments = [f"localhost:{deployment.port}", name, str(deployment.files[name]), str(deployment.backbone)]
    command = [sys.executable, liar.__file__, *arguments, str(tmp_path / "liar")]
    with (tmp_path / "liar.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        assert server.wait() == 0, server.said
    finally:
        process.kill()
        process.wait()
    for record in rounds_of(deployment.run)[1:]:
        assert set(record["failures"]) == {name}, record
        assert record["loss"] is not None
