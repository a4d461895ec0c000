"""Clients with policies in a run with real processes: who refuses is named, who tells less takes part all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fedlora.deploy.audit import AUDIT, verify
from tests.simulations.deploy.conftest import MakeDeployment
from tests.simulations.test_rounds import rounds_of

pytestmark = pytest.mark.slow


def test_a_policy_refuses_a_run_and_another_keeps_the_loss(make: MakeDeployment, tmp_path: Path) -> None:
    deployment = make("rounds=1")
    refusing, silent, free = deployment.clients
    policies = {refusing: {"min_rows": 10_000}, silent: {"metrics": ["num-examples"]}, free: {}}
    server = deployment.serve()
    for client, policy in policies.items():
        (tmp_path / f"{client}.yaml").write_text(yaml.safe_dump(policy))
        deployment.join(client, "--policy", str(tmp_path / f"{client}.yaml"))
    assert server.wait() == 0, server.said
    logs = {}
    for client in policies:
        path = tmp_path / f"home-{client}" / AUDIT
        assert verify(path).broken is None
        logs[client] = [json.loads(line) for line in path.read_text().splitlines()]
    (first,) = [each for each in rounds_of(deployment.run) if each["round"] == 1]
    assert set(first["failures"]) == {refusing}
    assert "policy.min_rows = 10000" in first["failures"][refusing]
    assert [line["event"] for line in logs[refusing]] == ["joined", "refused"]
    (kept,) = [line["metrics"] for line in logs[silent] if line["event"] == "answered" and line["metrics"]]
    (told,) = [line["metrics"] for line in logs[free] if line["event"] == "answered" and line["metrics"]]
    assert set(kept) == {"num-examples"}
    assert first["loss"] == told["train_loss"]  # of those who tell
