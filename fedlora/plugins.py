"""Load a user's class by import path (``package.module.Class``) or by file path (``./file.py:Class``)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from fedlora.config import nearest
from fedlora.errors import InputError

MOST_NAMES = 20
"""A module with more names than this has too many to list in a message."""
OWN_PACKAGES = ("fedlora", "strategies", "simulations")


def is_plugin_path(name: str) -> bool:
    """Whether ``name`` is an import or file path rather than a registered name."""
    return ":" in name or "." in name


def load_object(path: str, setting: str) -> Any:
    """Return the object at ``path``; ``setting`` names the key in messages.

    Raises:
        InputError: the file, module or attribute does not exist, does not import, or a module of the user shadows
            one of our packages.
    """
    file, colon, attribute = path.rpartition(":")
    if colon:
        module = _load_file(file, path, setting)
    else:
        name, _, attribute = path.rpartition(".")
        module = _load_module(name, path, setting)
    try:
        return getattr(module, attribute)
    except AttributeError:
        names = [name for name in vars(module) if not name.startswith("_")]
        listed = f" It defines: {', '.join(names)}." if len(names) <= MOST_NAMES else ""
        raise InputError(
            f"{setting} = '{path}': there is no '{attribute}' in it.{nearest(attribute, names)}{listed}"
        ) from None


def _load_file(file: str, path: str, setting: str) -> Any:
    location = Path(file).expanduser().resolve()
    if not location.is_file():
        raise InputError(f"{setting} = '{path}': the file {location} does not exist.")
    name = f"fedlora_plugin_{location.stem}_{hashlib.blake2b(str(location).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{setting} = '{path}' does not import: {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str, path: str, setting: str) -> Any:
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    try:
        return importlib.import_module(name)
    except Exception as error:
        package = name.split(".")[0]
        if package in OWN_PACKAGES and Path(package).exists():
            raise InputError(
                f"{setting} = '{path}': '{package}' is one of fedlora's own packages, so your folder '{package}' "
                f"cannot be imported under that name. Name the file instead: {setting}=./{name.replace('.', '/')}.py:"
                f"{path.rpartition('.')[2]}"
            ) from error
        raise InputError(f"{setting} = '{path}' does not import: {type(error).__name__}: {error}") from error
