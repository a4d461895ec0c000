"""The ServerApp for plain ``flwr run``: the same server side, in the process that Flower starts for it."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run that ``settings`` and ``clients`` of the run configuration describe."""
    import shlex
    from pathlib import Path

    from simulations.compose import compose_config
    from simulations.deploy.serve import Serving, serve_on

    clients = tuple(sorted(filter(None, str(context.run_config["clients"]).split(","))))
    config = compose_config(shlex.split(str(context.run_config["settings"])))
    serve_on(grid, config, Path(config.run_dir), Serving("", 0, None, clients))
