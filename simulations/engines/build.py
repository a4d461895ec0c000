"""From a settled configuration to the engine that it names."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from fedlora.client import Worker, client_app, worker_for
from fedlora.grid import ClientGrid
from simulations.engines.cohort import CohortGrid
from simulations.engines.executor import Executor, LocalExecutor
from simulations.engines.loop import LoopGrid
from simulations.engines.pool import Pools


def run_on_engine(
    worker: Worker,
    server: Callable[[ClientGrid], None],
    on_reply: Callable[[], None] = lambda: None,
    on_change: Callable[..., None] = lambda **values: None,
    pools: Pools | None = None,
) -> None:
    """Call ``server`` with the engine of the worker's configuration, and give back what the engine held.

    Args:
        worker: of this process; its configuration is settled (:func:`simulations.engines.choose.settle`).
        server: the rounds of a run.
        on_reply: called after each client.
        on_change: called with settings of the engine that had to change, such as ``tokens=1024``.
        pools: keeps Ray actors for later runs; without it they end with this one.
    """
    config = worker.federation.config
    if config.engine.name == "flower":
        from flwr.serverapp import Grid

        from simulations.engines.flower import FlowerGrid, run_on_flower

        if pools is not None:
            pools.close()  # Flower starts a Ray of its own
        workers, threads = config.engine.workers or 2, config.engine.threads or 1
        values = json.dumps(config.model_dump(mode="json"))

        def flower_server(grid: Grid, ended: threading.Event) -> None:
            server(FlowerGrid(grid, workers, ended, on_reply))

        run_on_flower(flower_server, client_app(partial(worker_for, values, config.run_dir)), workers, threads)
        return
    with build_engine(worker, on_reply, on_change, pools) as grid:
        server(grid)


@contextmanager
def build_engine(
    worker: Worker,
    on_reply: Callable[[], None] = lambda: None,
    on_change: Callable[..., None] = lambda **values: None,
    pools: Pools | None = None,
) -> Iterator[ClientGrid]:
    """The loop or cohort engine; see :func:`run_on_engine`."""
    engine, trainer = worker.federation.config.engine, worker.trainer
    if engine.name == "loop" and not engine.workers:
        yield LoopGrid(client_app(lambda: worker), on_reply)
        return
    tokens = engine.tokens if trainer.axis is not None and engine.tokens else 1

    def grid(executor: Executor) -> CohortGrid:
        return CohortGrid(worker, executor, tokens, on_reply, lambda changed: on_change(tokens=changed))

    if not engine.workers:
        yield grid(LocalExecutor(trainer))
        return
    from simulations.engines.actors import RayExecutor

    kept = pools is not None
    pools = pools or Pools()
    try:
        yield grid(RayExecutor(trainer, pools.get(engine)))
    except BaseException:
        kept = False  # who knows what its actors still do
        raise
    finally:
        if not kept:
            pools.close()
