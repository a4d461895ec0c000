"""Figures of a report as PNG or SVG files: a browser without a window opens the page and presses its own buttons."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from fedlora.errors import InputError

Format = Literal["svg", "png"]
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def find_browser() -> str:
    """The program that draws.

    Raises:
        InputError: playwright or a browser is missing; it says what to install.
    """
    if find_spec("playwright") is None:
        raise InputError("Figures are drawn by a browser through playwright. Install it: pip install playwright.")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise InputError(
            f"Figures are drawn by a browser, and none of {', '.join(BROWSERS)} is on the PATH. Install one, "
            "such as 'apt-get install chromium', or save single figures with the buttons of the page."
        )
    return browser


def save(page: Path, folder: Path, kind: Format) -> list[Path]:
    """Save every figure of a page that ``fedlora report`` wrote, as its buttons do.

    Args:
        page: the HTML file.
        folder: where the figures go, made where there is none: ``pareto-1.svg`` is that of the first section.
        kind: of file.

    Returns:
        The files, in the order of the page.

    Raises:
        InputError: see :func:`find_browser`.
    """
    program = find_browser()
    from playwright.sync_api import sync_playwright  # an extra: only who asks for files needs it

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        opened = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        opened.goto(page.resolve().as_uri())
        opened.wait_for_selector("html[data-ready]")
        for button in opened.locator(f"button[data-format={kind}]").all():
            with opened.expect_download() as waiting:
                button.click()
            files.append(folder / f"{button.get_attribute('data-figure')}.{kind}")
            waiting.value.save_as(files[-1])
        browser.close()
    return files
