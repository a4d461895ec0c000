"""Docstrings refer to code by Sphinx's roles: make links of them, or plain code where there is no page."""

import re
from typing import Any

from griffe import Extension, GriffeError, Object

ROLE = re.compile(r":(?:meth|class|mod|func|attr|data|exc):`~?([^`]+)`")


class Roles(Extension):
    """Rewrites the docstring of everything that is loaded."""

    def on_package(self, *, pkg: Object, **kwargs: Any) -> None:
        """Start when the whole package is known."""
        rewrite(pkg)


def rewrite(thing: Object) -> None:
    """Rewrite the docstring of ``thing``, and of what is in it."""
    if thing.docstring:
        thing.docstring.value = ROLE.sub(lambda role: linked(thing, role[1]), thing.docstring.value)
    for member in thing.members.values():
        if not member.is_alias:
            rewrite(member)  # type: ignore[arg-type]


def linked(thing: Object, name: str) -> str:
    """A link to ``name`` as it is understood inside of ``thing``."""
    first, *others = name.split(".")
    try:
        path = name if first == thing.package.path else ".".join([thing.resolve(first), *others])
        shown = thing.package.modules_collection[path].has_docstrings and "._" not in path
    except (GriffeError, KeyError):
        shown = False
    return f"[`{name}`][{path}]" if shown else f"`{name}`"
