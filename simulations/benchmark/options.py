"""The flags of ``fedlora bench``, without importing anything heavy."""

from __future__ import annotations

import argparse

DESCRIPTION = "measure rounds of every engine, of plain PEFT and of Flower's simulation on this machine"
EPILOG = """\
examples:
  fedlora bench                                        all workloads: an hour or two on two cores
  fedlora bench --only small --scale 0.25              a coffee break
  fedlora bench --only overhead --variants loop,cohort
  fedlora bench --grid --clients 16,64,256 --rows 1,4,16 --lengths 48 --backbones 2x128,minilm
  fedlora bench --write RESULTS.md                     also append a dated section to a file

workloads: small, small-real, medium, medium-real, overhead-4x48, overhead-4x16, overhead-1x16. With --grid, every
combination of the sizes instead. exit status 1: a variant failed, or trained something else than it should."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    parser.add_argument("--only", type=_names, default=(), metavar="NAMES", help="workloads, or first words of them")
    parser.add_argument("--variants", type=_names, default=(), metavar="NAMES", help="variants (default: all)")
    parser.add_argument("--repeats", type=_positive, default=5, metavar="N", help="rounds of each variant (default 5)")
    parser.add_argument("--scale", type=_scale, default=1.0, metavar="X", help="times as many clients (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--write", metavar="FILE", help="append a dated section to a Markdown file")
    parser.add_argument("--grid", action="store_true", help="every combination of the following sizes instead")
    parser.add_argument("--clients", type=_counts, default=(64,), metavar="N,...", help="(default 64)")
    parser.add_argument("--rows", type=_counts, default=(4,), metavar="N,...", help="rows a step (default 4)")
    parser.add_argument("--lengths", type=_counts, default=(48,), metavar="N,...", help="tokens a row (default 48)")
    parser.add_argument("--steps", type=_counts, default=(4,), metavar="N,...", help="steps a client (default 4)")
    parser.add_argument(
        "--backbones", type=_names, default=("minilm",), metavar="NAMES",
        help="minilm, or <layers>x<hidden> with random weights (default minilm)",
    )  # fmt: skip
    parser.add_argument("--real", action="store_true", help="rows keep their own lengths, up to --lengths")


def _names(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(word) for word in text.split(","))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 100")
    return value
