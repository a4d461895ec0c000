"""The page in a real browser: it opens offline, draws everything, and its buttons do what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from simulations.cli import main
from simulations.report import Report
from simulations.report.figures import PICTURES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def path(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(sweep), "-o", str(path)]) == 0
    return path


class Opened:
    """A page, with every request and every word of its console."""

    def __init__(self, browser: Browser, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_the_page_draws_everything_without_a_request_or_a_complaint(
    browser: Browser, path: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, path, width, scheme)
    assert opened.page.locator(".plot .main-svg").count() >= len(PICTURES)
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.page.locator("html").get_attribute("data-theme") == scheme
    outside = [url for url in opened.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert (outside, opened.complaints) == ([], [])
    opened.page.close()


def test_the_table_of_the_page_is_that_of_the_report(browser: Browser, path: Path, sweep: Path) -> None:
    opened = Opened(browser, path)
    names = opened.page.locator("tbody th").all_inner_texts()
    assert [name.strip() for name in names] == list(Report.of(sweep).table()["method"])
    opened.page.close()


def test_the_theme_can_be_switched(browser: Browser, path: Path) -> None:
    opened = Opened(browser, path)
    opened.page.click("#theme")
    assert opened.page.locator("html").get_attribute("data-theme") == "dark"
    opened.page.wait_for_function("document.querySelector('.plot').layout.paper_bgcolor === '#161b22'")
    opened.page.close()


def test_a_click_in_the_legend_hides_a_method_and_its_band(browser: Browser, path: Path) -> None:
    opened = Opened(browser, path)
    legend = opened.page.locator("#curve-rounds-1 .legendtoggle")
    name = opened.page.locator("#curve-rounds-1 .legendtext").first.text_content()
    legend.first.click()
    opened.page.wait_for_function(
        "name => document.getElementById('curve-rounds-1').data.filter(t => t.legendgroup === name)"
        ".every(t => t.visible === 'legendonly')",
        arg=name,
    )
    opened.page.close()


def test_names_are_text_and_never_markup(browser: Browser, sweep: Path, tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)><b>bold"
    shutil.copytree(sweep / "fedit-1", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "label": name}))
    Report.of(tmp_path / "run").write(tmp_path / "report.html")
    opened = Opened(browser, tmp_path / "report.html")
    assert opened.page.locator("tbody th").inner_text().strip() == name
    assert opened.page.locator("#error-1 .legendtext").text_content() == name
    assert opened.page.locator("#clients-1 .ytick").text_content() == name.replace(" ", "", 1)
    assert (opened.page.locator("img[src=x]").count(), opened.complaints) == (0, [])
    opened.page.close()


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<svg")])
def test_figures_are_saved_as_files(browser: Browser, path: Path, tmp_path: Path, kind: str, start: bytes) -> None:
    opened = Opened(browser, path)
    with opened.page.expect_download() as waiting:
        opened.page.click(f"button[data-figure=pareto-1][data-format={kind}]")
    waiting.value.save_as(tmp_path / "figure")
    assert (tmp_path / "figure").read_bytes().startswith(start)
    assert opened.complaints == []
    opened.page.close()


def test_tables_are_saved_as_files(browser: Browser, path: Path, tmp_path: Path, sweep: Path) -> None:
    opened = Opened(browser, path)
    with opened.page.expect_download() as waiting:
        opened.page.click("a[download='report.csv']")
    waiting.value.save_as(tmp_path / "saved.csv")
    assert main(["report", str(sweep), "-o", str(tmp_path / "x.html"), "--table", str(tmp_path / "x.csv")]) == 0
    assert (tmp_path / "saved.csv").read_bytes() == (tmp_path / "x.csv").read_bytes()
    opened.page.close()
