"""``python -m simulations.benchmark``: the same as ``fedlora bench``."""

from __future__ import annotations

import argparse
import sys

from fedlora.errors import FedloraError
from simulations.benchmark import options


def main() -> int:
    """Parse the flags and run."""
    layout = argparse.RawDescriptionHelpFormatter
    description = options.DESCRIPTION
    parser = argparse.ArgumentParser("simulations.benchmark", description=description, epilog=options.EPILOG,
                                     formatter_class=layout)  # fmt: skip
    options.add_arguments(parser)
    chosen = parser.parse_args()
    from simulations.benchmark.bench import bench

    try:
        return bench(chosen)
    except FedloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
