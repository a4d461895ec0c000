"""Commands and files of documentation pages, and how a command is made small enough to be run by a test."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from fedlora.config import Config
from simulations.cli import sort_arguments
from simulations.compose import compose_config, prepare_overrides

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<head>[^\n]*)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
DECISIVE = {
    "experiment", "method", "data", "task", "task.name", "partition", "backbone", "engine", "adapter",
    "adapter.config._target_",
}  # fmt: skip
"""Settings that decide what else must be given to make a run small."""


def blocks(page: Path, language: str) -> list[tuple[str, str, str]]:
    """Every block in a language: the paragraph before it, its head (``python title="mine.py"``), and its text."""
    text = page.read_text()
    return [
        (text[: found.start()].strip().rpartition("\n\n")[2], found["head"], found["body"])
        for found in BLOCK.finditer(text)
        if found["head"].partition(" ")[0] == language
    ]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's blocks of bash, without comments."""
    lines = [line for _, _, body in blocks(page, "bash") for line in body.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def inline(page: Path) -> list[list[str]]:
    """The words of every ``fedlora`` command inside a sentence."""
    return [shlex.split(found) for found in re.findall(r"`(fedlora [a-z]+(?: [^`]+)?)`", page.read_text())]


def files(page: Path) -> dict[str, str]:
    """Files that the page gives whole; their name is the block's title, or of Python the first word before it."""
    found = {}
    for _, head, body in blocks(page, "yaml"):
        if name := re.search(r'title="(\S+)"', head):
            found[name[1]] = body
    for before, head, body in blocks(page, "python"):
        name = re.search(r'title="(\S+)"', head) or re.match(r"`(\S+\.py)`", before)
        if name:
            included = re.fullmatch(r'--8<-- "(.+)"\n', body)
            found[name[1]] = (ROOT / included[1]).read_text() if included else body
    return found


def snippets(page: Path) -> list[str]:
    """The other blocks of Python, which are no files."""
    whole = files(page).values()
    return [body for _, head, body in blocks(page, "python") if body not in whole and "title=" not in head]


def single(overrides: Sequence[str]) -> list[str]:
    """The first trial of a sweep; without what is Hydra's own, and values that a sweeper draws."""
    first = []
    for override in OverridesParser.create().parse_overrides(prepare_overrides(overrides)):
        if override.get_key_element().lstrip("+").startswith("hydra"):
            continue
        if override.is_choice_sweep():
            first.append(f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}")
        elif not override.is_sweep_override():
            first.append(str(override.input_line))
    return first


@lru_cache
def choices(overrides: tuple[str, ...]) -> Config:
    """The configuration with these choices of options, and otherwise defaults."""
    return compose_config(overrides)


def small(overrides: Sequence[str], place: Path, run_dir: str | None) -> list[str]:
    """The same settings on small data and a tiny backbone where they choose none, for one round of one step a client.

    Args:
        overrides: settings of a command.
        place: the reader's folder; see :mod:`tests.docs.reader`.
        run_dir: where the run goes if the settings do not say.
    """
    config = choices(tuple(o for o in single(overrides) if o.partition("=")[0].lstrip("+") in DECISIVE))
    quick = {
        "rounds": "1", "cohort.size": "null", "client.local_steps": "1", "client.local_epochs": "1",
        "client.batch_size": "4", "client.max_length": "24", "eval.max_rows": "16", "eval.max_clients": "2",
        "partition.min_rows": "3", "engine": "cohort" if config.engine.name == "cohort" else "loop",
        "engine.threads": "1",
    }  # fmt: skip
    if config.data.name == "rotten_tomatoes":
        quick |= {"data": "csv", "data.path": f"{place}/sites.csv", "data.client": "site"}
    if config.data.split.public_rows:
        quick |= {"data.split.public_rows": "8"}
    if config.data.name in ("mnist", "mnist_pairs", "digits", "chatterbot"):
        quick |= {"data.limit": "600"}
    if config.backbone.name in ("minilm", "smollm2"):
        quick |= {"backbone": "hf", "backbone.path": f"{place}/tiny-{config.backbone.name}"}
    if config.engine.name == "cohort":
        quick |= {"engine.workers": "0", "engine.tokens": "512"}  # Ray has tests of its own
    shared = config.backbone.name != "heterogeneous"
    if shared and config.adapter.get("rank") and not any(o.startswith("adapter.client_ranks=") for o in overrides):
        quick |= {"adapter.rank": "2"}
    if config.partition.clients is not None:
        quick |= {"partition.clients": "8"}
    if config.task.get("max_new_tokens"):
        quick |= {"task.max_new_tokens": "4"}
    if run_dir is not None and not any(o.startswith("run_dir=") for o in overrides):
        quick |= {"run_dir": run_dir}
    return [o for o in overrides if o.partition("=")[0].lstrip("+") not in quick] + [
        f"{k}={v}" for k, v in quick.items()
    ]


def reduced(words: Sequence[str], place: Path, number: int, further: Sequence[str] = ()) -> list[str]:
    """The arguments of ``fedlora`` for a command of a page, made small; ``further`` settings replace its own."""
    command = words[1]
    if command not in ("simulate", "plan"):
        return list(words[1:])
    flags, overrides = sort_arguments(words[1:])
    keys = {o.partition("=")[0] for o in further}
    overrides = [o for o in overrides if o.partition("=")[0] not in keys] + list(further)
    return [*flags, *small(overrides, place, f"runs/command-{number}" if command == "simulate" else None)]
