"""FedSVD on an A that is orthonormal from the start: exact, and orthonormal after every refactoring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlora.errors import InputError
from fedlora.federation import Federation
from simulations.simulate import start
from strategies import FedSVD
from tests.conftest import Compose


@pytest.mark.parametrize("subspace", ["shared", "complementary"])
def test_fedsvd_refreshes_orthogonal_lora_exactly(tiny: Compose, tmp_path: Path, subspace: str) -> None:
    config = tiny("method=fedsvd", "adapter=orthogonal", f"adapter.subspace={subspace}", "client.lr=1e-2")
    summary = start(config, tmp_path / "run")
    assert 0 < summary["aggregation_error"]["max"] <= 1e-6
    assert summary["totals"]["setup_bytes"] > 0
    before = Federation(config).build_model()
    after = load_file(tmp_path / "run" / "adapter" / "fedlora_state.safetensors")
    for key, rows in before.read(before.frozen).items():
        assert (after[key] @ after[key].T - torch.eye(len(rows))).norm() <= 1e-5
        assert (after[key] - rows).norm() > 0.1


def test_fedsvd_refuses_rows_that_each_client_has_for_itself(tiny: Compose) -> None:
    federation = Federation(tiny("method=orthogonal", "adapter.subspace=disjoint", "adapter.rank=2"))
    with pytest.raises(InputError, match="A common to all clients"):
        FedSVD().prepare(federation.build_meta_model())
