"""How methods look: the same colour, symbol and dash in every figure of a page, told apart by the colour-blind, too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PALETTE = ("#2F80C8", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""After Okabe and Ito (2008): black and yellow, which vanish on a dark or a light page, are out, blue is lighter."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
PHASES = {
    "select": "#B0A8B9", "train": "#7A6FD0", "aggregate": "#E58606", "evaluate": "#24A5A5", "other": "#8A8F98",
}  # fmt: skip
GREY = "#8A8F98"


@dataclass(frozen=True)
class Style:
    """Colour, marker and line of a method."""

    color: str
    symbol: str
    dash: str

    def band(self) -> str:
        """The colour, seen through."""
        red, green, blue = (int(self.color[at : at + 2], 16) for at in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.16)"


def styles(methods: Iterable[str], references: Iterable[str]) -> dict[str, Style]:
    """A style for every name; after six methods colours come again with another symbol and dash."""
    chosen = {name: Style(GREY, "circle-open", DASHES[1 + at % 3]) for at, name in enumerate(dict.fromkeys(references))}
    for at, name in enumerate(name for name in dict.fromkeys(methods) if name not in chosen):
        turn, place = divmod(at, len(PALETTE))
        chosen[name] = Style(PALETTE[place], SYMBOLS[(place + turn) % len(SYMBOLS)], DASHES[turn % len(DASHES)])
    return chosen
