"""What code runs at a client: a hash of the installed package, the same on every machine that has the same files."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fedlora

PACKAGES = {"fedlora": "*.py", "strategies": "*.py", "simulations": "*.py", "conf": "*.yaml"}
"""What is hashed: the files of each package of the distribution that have such names."""
OTHERS = ("torch", "transformers", "peft", "flwr", "opacus")


@cache
def code_hash() -> str:
    """Sixteen hexadecimal digits of a SHA-256 over names and bytes of all files of the package.

    It does not depend on where the package lies, nor on the order in which the file system lists it; a single changed
    byte, a line's end included, changes it.
    """
    return hash_of(Path(fedlora.__file__).parents[1])


def hash_of(place: Path) -> str:
    """The hash of the packages that lie in ``place``."""
    digest = hashlib.sha256()
    found = [path for package, names in PACKAGES.items() for path in (place / package).rglob(names)]
    for name, path in sorted((path.relative_to(place).as_posix(), path) for path in found):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def what_runs() -> str:
    """What runs at a client, in two sentences for people."""
    libraries = ", ".join(f"{name} {_version(name)}" for name in OTHERS)
    return (
        f"fedlora {fedlora.__version__}, code {code_hash()}, on Python {platform.python_version()} with {libraries}. "
        "Only installed code runs: nothing that a server sends is imported or executed."
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
