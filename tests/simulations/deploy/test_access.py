"""Who gets in: a client whose key the server has, that knows the server's authority, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from fedlora.deploy.keys import make_server_certificates
from tests.simulations.deploy.conftest import MakeDeployment

pytestmark = pytest.mark.slow


def test_strangers_do_not_get_in_and_the_run_goes_on(make: MakeDeployment, tmp_path: Path) -> None:
    deployment = make(encrypted=True)
    make_server_certificates(tmp_path / "others", ["localhost"])
    unknown = deployment.make_key("unknown")
    deployment.files |= {"unknown": deployment.files["client-0000"], "keyless": deployment.files["client-0000"]}
    server = deployment.serve()
    elsewhere = deployment.join("unknown", key=unknown, ca=tmp_path / "others" / "ca.crt")
    elsewhere.wait_until(lambda: "is not one that" in elsewhere.said)
    elsewhere.stop()
    stranger = deployment.join("unknown", key=unknown)
    stranger.wait_until(lambda: "does not know this client's key" in stranger.said)
    stranger.stop()
    certificates, deployment.certificates = deployment.certificates, None
    keyless = deployment.join("keyless")
    keyless.wait_until(lambda: "nobody answers there, or only with encryption" in keyless.said)
    keyless.stop()
    deployment.certificates = certificates
    del deployment.files["unknown"], deployment.files["keyless"]
    deployment.join_all()
    assert server.wait() == 0, server.said
    ledger = pd.read_parquet(deployment.run / "ledger.parquet")
    assert set(ledger["client"]) == set(deployment.clients)
    assert set(ledger["status"]) == {"ok"}
