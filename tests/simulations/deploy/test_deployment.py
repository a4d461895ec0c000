"""A run with real clients is the run of the simulation: the same configuration, code, folder and numbers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from safetensors.torch import load_file

from tests.simulations.deploy.conftest import MakeDeployment
from tests.simulations.test_rounds import rounds_of


def test_a_deployed_run_over_tls_has_the_bits_of_the_loop_engine(make: MakeDeployment, simulated: Path) -> None:
    deployment = make(encrypted=True)
    server, clients = deployment.serve(), deployment.join_all()
    assert server.wait() == 0, server.said
    loop, deployed = (
        load_file(f / "adapter" / "fedlora_state.safetensors") for f in (simulated / "run", deployment.run)
    )
    assert loop.keys() == deployed.keys()
    for key, value in loop.items():
        assert value.equal(deployed[key]), key
    for one, two in zip(rounds_of(simulated / "run"), rounds_of(deployment.run), strict=True):
        assert one["loss"] == two["loss"]
        assert one["cohort"] == two["cohort"]
        assert two["metrics"] == {key: one["metrics"][key] for key in two["metrics"]}
        assert "test_accuracy" in two["metrics"]
    ledgers = [pd.read_parquet(f / "ledger.parquet") for f in (simulated / "run", deployment.run)]
    ledgers[1] = ledgers[1][ledgers[1]["round"] > 0].reset_index(drop=True)  # where they agree on the terms
    columns = ["round", "client", "direction", "payload", "setup", "transport", "status"]
    pd.testing.assert_frame_equal(ledgers[0][columns], ledgers[1][columns])
    for client in clients.values():
        assert client.process.poll() is None, client.said  # ready for the next run
