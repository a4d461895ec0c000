"""A report of finished runs, for the command and for notebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from fedlora.errors import InputError
from fedlora.store import write_atomically
from simulations.report import page, pictures, table
from simulations.report.figures import PICTURES
from simulations.report.load import Frame, Section, load
from simulations.report.style import Style, styles


@dataclass(frozen=True)
class Report:
    """Runs in groups that can be compared.

    Attributes:
        sections: one for each data, partition, task and backbone; most reports have one.
    """

    sections: list[Section]

    @classmethod
    def of(cls, *paths: str | Path, on: str | None = None) -> Report:
        """Read run folders, folders of sweeps and patterns; ``on``: ``seen``, ``test`` or ``validation`` rows.

        Raises:
            InputError: there is nothing finished, or something that cannot be read.
        """
        return cls(load(paths, on))

    @cached_property
    def styles(self) -> dict[str, Style]:
        """Colour, symbol and dash of every method, the same everywhere."""
        runs: Frame = pd.concat([section.runs for section in self.sections])
        return styles(runs["method"], runs.loc[runs["reference"], "method"])

    def figures(self, section: int = 0) -> dict[str, go.Figure]:
        """The figures of a section by name (``pareto``, ``curve-rounds``, ...); those without numbers are missing."""
        drawn = {picture.name: picture.draw(self.sections[section], self.styles) for picture in PICTURES}
        return {name: figure for name, figure in drawn.items() if figure is not None}

    def table(self, section: int = 0) -> Frame:
        """Means and sample standard deviations over seeds, a row a method."""
        return table.numbers(self.sections[section])

    def html(self) -> str:
        """The whole page."""
        return page.render(self.sections, [self.figures(at) for at in range(len(self.sections))], self.styles)

    def write(
        self,
        path: str | Path,
        tables: Sequence[str | Path] = (),
        figures: str | Path | None = None,
        kind: pictures.Format = "svg",
    ) -> list[Path]:
        """Write the page, and what else is asked for.

        Args:
            path: of the page.
            tables: files whose format is their ending: ``.csv``, ``.md`` or ``.tex``.
            figures: a folder for every figure as a file; a browser draws them.
            kind: of these files.

        Returns:
            The files, the page first.

        Raises:
            InputError: a file cannot be written there, or there is no browser to draw figures; then none is written.
        """
        for each in map(Path, tables):
            if each.suffix not in table.EXPORTS:
                raise InputError(f"'{each}' should end in {', '.join(table.EXPORTS)}: that says how it is written.")
        for each in map(Path, (path, *tables)):
            _refuse_unwritable(each)
            if each.is_dir():
                raise InputError(f"'{each}' is a folder. Name a file, such as {each / 'report.html'}.")
        if figures is not None:
            _refuse_unwritable(Path(figures))
            if Path(figures).is_file():
                raise InputError(f"'{figures}' is a file. Name a folder for the figures.")
            pictures.find_browser()
        texts = {Path(each): table.EXPORTS[Path(each).suffix](self.sections) for each in tables}
        texts = {Path(path): self.html(), **texts}
        try:
            for place, text in texts.items():
                write_atomically(place, text)
        except OSError as error:
            raise InputError(f"'{error.filename}' cannot be written: {error.strerror}.") from error
        return [*texts, *(pictures.save(Path(path), Path(figures), kind) if figures is not None else [])]


def _refuse_unwritable(path: Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputError(f"'{path}' cannot be written: the folder '{parent}' does not exist.")
    if not os.access(parent, os.W_OK):
        raise InputError(f"'{path}' cannot be written: '{parent}' is not yours to write to.")
