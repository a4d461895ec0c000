"""The hash of the code: the same wherever the same files are, another for any other byte."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fedlora
from fedlora.deploy.code import PACKAGES, code_hash, hash_of, what_runs

PLACE = Path(fedlora.__file__).parents[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(PLACE / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_it_does_not_depend_on_the_place_or_on_what_python_leaves_behind(copy: Path) -> None:
    (copy / "fedlora" / "__pycache__").mkdir()
    (copy / "fedlora" / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"1")
    assert hash_of(copy) == code_hash()
    assert len(code_hash()) == 16


def _edited(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda place: _edited(place / "fedlora" / "client.py", b"\n", b"\r\n"),
        lambda place: _edited(place / "conf" / "config.yaml", b"rounds", b"Rounds"),
        lambda place: (place / "strategies" / "average.py").unlink(),
        lambda place: (place / "simulations" / "more.py").write_text(""),
        lambda place: (place / "fedlora" / "store.py").rename(place / "fedlora" / "stores.py"),
    ],
    ids=["line end", "setting", "missing", "more", "renamed"],
)
def test_any_other_byte_gives_another_hash(copy: Path, change: Callable[[Path], object]) -> None:
    change(copy)
    assert hash_of(copy) != code_hash()


def test_what_runs_is_said_in_words() -> None:
    for part in (fedlora.__version__, code_hash(), "torch", "Only installed code runs"):
        assert part in what_runs()


def test_policy_audit_keys_and_code_import_nothing_heavy() -> None:
    modules = ", ".join(f"fedlora.deploy.{name}" for name in ("policy", "allowance", "audit", "keys", "code"))
    code = f"import sys, {modules}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "transformers", "flwr", "ray", "hydra", "pandas", "simulations"} & set(found)
