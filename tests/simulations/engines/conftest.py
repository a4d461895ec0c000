"""One Ray for all tests of a module: actors of a run come and go on it."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator

import pytest


def forget_processes() -> None:
    """Collect the handles of Ray's processes, which it ends without waiting for them; Python would warn of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(autouse=True)
def _no_handles_left() -> Iterator[None]:
    yield
    forget_processes()


@pytest.fixture(scope="module")
def ray_of_four() -> Iterator[None]:
    """Ray with four cores and two GPUs, which it only counts."""
    import ray

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    forget_processes()
