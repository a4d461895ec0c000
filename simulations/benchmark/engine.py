"""The engine of a configuration, as ``fedlora simulate`` builds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedlora.client import Worker, client_app
from fedlora.config import Config
from fedlora.grid import ClientGrid
from simulations.engines.cohort import CohortGrid
from simulations.engines.loop import LoopGrid


@contextmanager
def engine_for(worker: Worker, config: Config) -> Iterator[ClientGrid]:
    """The loop or cohort engine of ``config``."""
    if config.engine.name == "cohort":
        yield CohortGrid(worker, config.engine.tokens)
    else:
        yield LoopGrid(client_app(config.model_dump(), config.run_dir))
