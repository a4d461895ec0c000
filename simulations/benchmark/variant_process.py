"""``python -m simulations.benchmark.variant_process TASK``: one variant, started by the driver."""

from __future__ import annotations

import sys

from simulations.benchmark.serving import Server, Task, own_channel


def main() -> None:
    """Run the variant that the first argument describes until the driver closes the input."""
    channel = own_channel()
    task = Task.from_json(sys.argv[1])
    server = Server(task, channel)
    if task.variant.kind == "flower":
        from simulations.benchmark import flower as program
    elif task.variant.kind == "plain_central":
        from simulations.benchmark import plain_central as program
    else:
        from simulations.benchmark import own as program
    program.run(task, server.serve)


if __name__ == "__main__":
    main()
