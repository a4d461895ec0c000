"""The documentation as a reader has it: built strictly, whole, and usable from disk without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert built.returncode == 0, built.stderr  # a broken link, anchor or reference, or a page that is in no menu
    return folder


def test_every_module_has_its_page(site: Path) -> None:
    for package in ("fedlora", "strategies", "simulations"):
        for path in (ROOT / package).rglob("*.py"):
            if not path.name.startswith("__"):
                assert (site / "api" / f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}.html").exists()
    assert 'id="strategies.average.Average.fold"' in (site / "api" / "strategies.average.html").read_text()


def test_references_in_docstrings_are_links(site: Path) -> None:
    text = (site / "api" / "strategies.base.html").read_text()
    assert re.search(r'<a[^>]+href="#strategies.base.FederatedStrategy.fold"><code>fold</code></a>', text)
    for page in (site / "api").glob("*.html"):
        shown = re.sub(r"<details class=\"mkdocstrings-source\">.*?</details>", "", page.read_text(), flags=re.DOTALL)
        assert re.findall(r":(?:meth|class|mod|func|attr|data|exc):", shown) == [], page


def test_no_page_asks_for_anything_outside_of_the_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        asked = re.findall(r'<(?:script|img|iframe|link)\b[^>]*?(?:src|href)="(?:https?:)?//[^"]*"', page.read_text())
        assert asked == [], page


def test_the_search_works_from_disk(site: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, requested = browser.new_page(), []
        page.on("request", lambda request: requested.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.locator(".md-search__input").press_sequentially("fold")
        assert page.locator(".md-search-result__item a").first.get_attribute("href", timeout=20_000)
        browser.close()
    assert {url.partition(":")[0] for url in requested} <= {"file", "data", "about", "blob"}
