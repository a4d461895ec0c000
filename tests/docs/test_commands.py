"""Every command of the README and of the documentation does what it says: run here, small, in the order of the page."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import fedlora
from fedlora import Result
from simulations.cli import _parser, main, sort_arguments
from simulations.compose import CONF, compose_config
from tests.docs import reader
from tests.docs.commands import PAGES, ROOT, commands, files, inline, reduced, single, small, snippets

ELSEWHERE = {
    "fedlora bench": "takes minutes, and measures this machine",
    "engine.address=": "needs a Ray cluster",
    "hydra/launcher=submitit_slurm": "needs Slurm",
    "source .venv/bin/activate": "is the shell's own",
    "tensorboard ": "is a server",
    "fedlora serve ": "waits for clients",
    "fedlora join fl.example.org ": "needs that server",
    "fedlora join 127.0.0.1 ": "needs a server",
    "fedlora audit client-site-a": "needs a client that has been there",
    "lm_eval ": "is another program, and needs the hub",
}
"""Commands that cannot be run here, by a part of them, and why. What can be checked of their settings is."""

FEWER = {
    "experiment=compare": ["method=fedit,ffa", "client.lr=1e-3,1e-2", "seed=1", "tuning.seeds=[1,2]"],
    "seed=1,2,3": ["seed=1"],
    "seed=1,2,3,4": ["seed=1,2"],
    "hydra.sweeper.n_trials=20": ["hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"],
}
"""Sweeps of many trials, by a part of them, and what makes them small."""

FAILING: dict[str, dict[str, str]] = {}
"""Commands of a page that do not work, by a part of them, and why."""


def matching(table: dict[str, str], words: list[str]) -> str | None:
    """The entry of a table that a command has in it."""
    return next((part for part in table if part in " ".join(words) + " "), None)


@pytest.fixture(scope="module")
def furnished(tiny_bert: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reader")
    reader.settle(place, tiny_bert, tiny_llama)
    return place


@pytest.fixture(scope="module")
def tried() -> set[tuple[str, ...]]:
    """Commands of the pages before."""
    return set()


def stands_alone(words: list[str]) -> bool:
    """Whether a command needs no file of its page, and leaves none for the next command."""
    return words[1] in ("simulate", "plan", "methods") and not re.search(r"run_dir=|\./", " ".join(words))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Optuna 2 is imported, with an old use of SQLAlchemy
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_the_page_works(
    page: Path,
    furnished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tried: set[tuple[str, ...]],
    subtests: pytest.Subtests,
) -> None:
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    for name, text in files(page).items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    failing = FAILING.get(str(page.relative_to(ROOT)), {})
    for number, words in enumerate(commands(page)):
        if stands_alone(words) and tuple(words) in tried:
            continue
        tried.add(tuple(words))
        with subtests.test(shlex.join(words)):
            status = outcome(words, tmp_path, number)
            said = capfd.readouterr()
            assert (status != 0) == (matching(failing, words) is not None), f"{said.out}\n{said.err}"
    monkeypatch.setattr(fedlora, "simulate", partial(smaller, tmp_path, fedlora.simulate))
    for text in snippets(page):
        with subtests.test(text):
            exec(compile(text, str(page), "exec"), {})


def smaller(place: Path, simulate: Callable[..., Result], *overrides: str, run_dir: str) -> Result:
    """``fedlora.simulate`` with small settings."""
    return simulate(*small(overrides, place, None), run_dir=run_dir)


def outcome(words: list[str], place: Path, number: int) -> int:
    """Run a command, or check what can be checked of it, and return its exit status."""
    program = words[0]
    if matching(ELSEWHERE, words):
        return composes(words)
    if words[:2] == ["fedlora", "resume"]:
        reader.interrupt(place, place / words[2])
    if program == "fedlora":
        further = [setting for part, settings in FEWER.items() if part in words for setting in settings]
        return main(reduced(words, place, number, further))
    if program == "python":
        return script(words, place, number)
    if program == "make":
        targets = re.findall(r"^([a-z.-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return 0 if words[1] in targets else 2
    if words[:2] == ["pip", "install"]:
        return installs(words)
    raise AssertionError(f"no test knows how to check '{program}'")


def script(words: list[str], place: Path, number: int) -> int:
    """Run ``python file.py settings`` in this process, made small like ``fedlora simulate``."""
    arguments = reduced(["fedlora", "simulate", *words[2:]], place, number)[1:]
    before, sys.argv = sys.argv, [words[1], *arguments]
    try:
        runpy.run_path(words[1], run_name="__main__")
    finally:
        sys.argv = before
    return 0


def installs(words: list[str]) -> int:
    """Whether an extra that is named is one of the package's."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return max((found not in extras for word in words for found in re.findall(r"\[(.+)\]$", word)), default=False)


def composes(words: list[str]) -> int:
    """Whether the flags of a command are read, its settings compose, and Hydra knows what launches it."""
    if words[0] != "fedlora":
        return 0
    flags, overrides = sort_arguments(words[1:])
    _parser().parse_args(flags)
    if words[1] in ("simulate", "plan"):
        compose_config(single(overrides))
        of_hydra = [override for override in overrides if override.startswith("hydra")]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("config", of_hydra, return_hydra_config=True)
    return 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_settings_of_every_command_in_a_sentence_compose(page: Path) -> None:
    for words in inline(page):
        flags, overrides = sort_arguments(words[1:])
        if words[1] in ("simulate", "plan"):
            compose_config(single(overrides))
        elif not overrides and words[1] == "bench":
            _parser().parse_args(flags)


def test_no_exception_outlives_its_command() -> None:
    everything = [words for page in PAGES for words in commands(page)]
    assert [part for part in ELSEWHERE if not any(matching({part: ""}, words) for words in everything)] == []
    assert [part for part in FEWER if not any(part in words for words in everything)] == []
    for name, table in FAILING.items():
        of_page = commands(ROOT / name)
        assert [part for part in table if not any(matching({part: ""}, words) for words in of_page)] == []
