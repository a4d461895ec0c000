"""A small sweep that every test of reports reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.cli import main
from simulations.compose import compose_config
from simulations.simulate import start


@pytest.fixture(scope="session")
def sweep(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of references and two methods that travel."""
    folder = tmp_path_factory.mktemp("sweep")
    for method in ("zero_shot", "local", "central", "fedit", "ffa"):
        for seed in (1, 2):
            settings = [f"method={method}", f"seed={seed}", "adapter.rank=4", "eval.every=1"]
            start(compose_config([*tiny_overrides, *settings]), folder / f"{method}-{seed}")
    return folder


@pytest.fixture(scope="session")
def tuned(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned sweep: three methods, two learning rates with one seed, then the better one with two."""
    folder = tmp_path_factory.mktemp("tuned") / "sweep"
    command = ["simulate", "-m", *tiny_overrides, "adapter.rank=4", "rounds=1", "tracking=none", f"run_dir={folder}"]
    swept = ["method=local,ffa,fedit", "client.lr=1e-4,1e-2", "seed=1"]
    assert main([*command, *swept, "+tuning.setting=client.lr", "+tuning.seeds=[1,2]"]) == 0
    return folder
