from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simulations.compose import compose_config
from simulations.simulate import start
from simulations.split import split
from tests.simulations.deploy.helpers import Deployment

SETTINGS = [
    "method=fedit", "backbone=hf", "adapter.rank=4", "rounds=3", "cohort.size=null", "client.batch_size=4",
    "client.max_length=24", "eval.every=1", "engine.threads=1", "tracking=none",
]  # fmt: skip
MakeDeployment = Callable[..., Deployment]


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, reviews: Path) -> Path:
    """A folder with the simulation ``run`` of three clients on the loop engine, and in ``silos`` what each owns."""
    folder = tmp_path_factory.mktemp("simulated")
    rows = ["data=csv", f"data.path={reviews}", "partition=iid", "partition.clients=4"]
    config = compose_config([*SETTINGS, f"backbone.path={tiny_bert}", *rows, "engine=loop"])
    split(config, folder / "silos")
    start(config, folder / "run")
    return folder


@pytest.fixture
def make(simulated: Path, tiny_bert: Path, tmp_path: Path) -> Iterator[MakeDeployment]:
    """Make a deployment of the simulated run: ``make("rounds=5", encrypted=True)``."""
    made: list[Deployment] = []

    def deployment(*settings: str, encrypted: bool = False) -> Deployment:
        files = {path.stem: path for path in sorted((simulated / "silos").glob("*.csv"))}
        certificates = tmp_path / "certificates" if encrypted else None
        found = Deployment(tmp_path, tiny_bert, files, [*SETTINGS, *settings], certificates)
        if encrypted:
            found.make_certificates()
        made.append(found)
        return found

    yield deployment
    for one in made:
        one.stop()
