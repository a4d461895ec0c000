"""What clients are able to train, where they differ: the rank, the heads, the modules or the model of each.

A setting declares it as a list, which clients get in turn in the order of their sorted ids, or as a distribution
``{choice: share}``, from which each client draws once, by the seed and its id. A client that trains some modules or
heads holds the global model and trains its part; for the server everything else is as it was sent.

The server knows none of this from its configuration: a client announces its capability when it is first met.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fedlora.errors import FedloraError
from fedlora.seeding import numpy_rng

Choice = TypeVar("Choice", int, str)
ALL = "all"


@dataclass(frozen=True)
class Capability:
    """What one client trains.

    Attributes:
        rank: of its factors; ``None``: that of the adapter.
        heads: how many it trains in a round; ``None``: all of the adapter.
        modules: last names of the adapted modules that it trains; none: all of them.
        model: its private model; ``None`` where all clients have the same backbone.
    """

    rank: int | None = None
    heads: int | None = None
    modules: tuple[str, ...] = ()
    model: str | None = None


WHOLE = Capability()
"""Of a client that trains everything."""


def assigned(
    choices: Sequence[Choice] | Mapping[Choice, float], position: int, seed: int, kind: str, client: str
) -> Choice:
    """The choice of the client ``client``, the one at ``position`` of all.

    Args:
        choices: taken in turn, or drawn by their shares, which are relative to their sum.
        position: of the client in the sorted list of all training clients.
        seed: of the run.
        kind: what is chosen, so that draws of different kinds are independent.
        client: its id.
    """
    if not isinstance(choices, Mapping):
        return choices[position % len(choices)]
    names, total = list(choices), sum(choices.values())
    rng = numpy_rng(seed, "capability", kind, client)
    return names[int(rng.choice(len(names), p=[choices[name] / total for name in names]))]


def modules_named(selection: str) -> tuple[str, ...]:
    """The module names of a choice of ``adapter.client_modules``: ``query+value``, or none for ``all``."""
    return () if selection == ALL else tuple(name.strip() for name in selection.split("+"))


def announcement(capability: Capability) -> dict[str, Any]:
    """A capability as a client announces it; whatever it leaves out is as the run has it."""
    said = {
        "rank": capability.rank,
        "heads": capability.heads,
        "modules": list(capability.modules),
        "model": capability.model,
    }
    return {name: value for name, value in said.items() if value}


def announced(said: Mapping[str, Any], differences: Collection[str]) -> Capability:
    """The capability in an announcement.

    Args:
        said: what :func:`announcement` gives.
        differences: the names in it in which clients of this run may differ.

    Raises:
        FedloraError: it announces something else, or values of the wrong kind.
    """
    for name, value in said.items():
        if name not in differences:
            raise FedloraError(
                f"it announces '{name}', and clients of this run differ in {', '.join(sorted(differences))} only: "
                f"leave '{name}' out"
            )
        wanted, fits = KINDS[name]
        if not fits(value):
            raise FedloraError(f"it announces {name} = {value!r}: announce {wanted}")
    return Capability(**{**said, "modules": tuple(said.get("modules", ()))})


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_name(value: Any) -> bool:
    return type(value) is str and value != ""


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_name, value))


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "rank": ("a positive whole number", _is_count),
    "heads": ("a positive whole number", _is_count),
    "modules": ("a list of names", _are_names),
    "model": ("a name", _is_name),
}
