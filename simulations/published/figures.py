"""``python -m simulations.published.figures report.html OUT_DIR``: figures of a report as SVG files.

Opens the page that ``fedlora report`` wrote in a Chromium without a window and asks plotly for each figure as the page
draws it. A file is called after its figure: ``clients-1.svg`` is the spread over clients of the first section. Needs
playwright and a Chromium, which the tests need too.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from playwright.sync_api import sync_playwright

from fedlora.errors import InputError

BROWSERS = ("chromium", "google-chrome", "chromium-browser")
FIGURES = ("clients", "pareto")
WIDTH = 900
TO_IMAGE = """([id, width]) => {
  const plot = document.getElementById(id);
  return Plotly.toImage(plot, {format: "svg", width, height: plot.clientHeight});
}"""


def export(report: Path, folder: Path, names: Sequence[str] = FIGURES) -> list[Path]:
    """Write the figures called ``names`` of every section of ``report`` into ``folder``.

    Args:
        report: the page that ``fedlora report`` wrote.
        folder: made where there is none.
        names: of :data:`simulations.report.figures.PICTURES`.

    Returns:
        The files, in the order of the page.

    Raises:
        InputError: there is no such page, no Chromium, or no figure of these names.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise InputError(f"A browser draws figures, and none of {', '.join(BROWSERS)} is installed. Install one.")
    if not report.is_file():
        raise InputError(f"There is no page '{report}'. Write it with 'fedlora report RUNS -o {report}'.")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = opened.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        drawn = page.locator(".plot").evaluate_all("plots => plots.map(plot => plot.id)")
        chosen = [name for name in drawn if name.rpartition("-")[0] in names]
        pictures = {name: page.evaluate(TO_IMAGE, [name, WIDTH]) for name in chosen}
        opened.close()
    if not pictures:
        raise InputError(f"'{report}' has none of the figures {', '.join(names)}. It has: {', '.join(drawn)}.")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, uri in pictures.items():
        files.append(folder / f"{name}.svg")
        files[-1].write_text(unquote(uri.partition(",")[2]) + "\n")
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    """Export the figures of one report and name the files."""
    parser = argparse.ArgumentParser(prog="simulations.published.figures", description="Figures of a report as SVG.")
    parser.add_argument("report", type=Path, help="the page that 'fedlora report' wrote")
    parser.add_argument("folder", type=Path, help="where the figures go")
    parser.add_argument("--figures", nargs="+", default=FIGURES, help=f"which; default: {' '.join(FIGURES)}")
    options = parser.parse_args(arguments)
    try:
        files = export(options.report, options.folder, options.figures)
    except InputError as error:
        parser.error(str(error))
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
