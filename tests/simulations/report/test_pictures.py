"""Figures become files: all of them, drawn by a real browser, and a mistake is known before anything is written."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from simulations.cli import main
from simulations.report import Report
from simulations.report.pictures import BROWSERS

needs_browser = pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium is installed")


@needs_browser
def test_every_figure_is_a_vector_file_with_its_text(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, folder = tmp_path / "report.html", tmp_path / "figures"
    assert main(["report", str(sweep), "-o", str(page), "--figures", str(folder)]) == 0
    assert {file.stem for file in folder.iterdir()} == {f"{name}-1" for name in Report.of(sweep).figures()}
    said = capsys.readouterr().out
    for file in folder.iterdir():
        assert str(file) in said
        assert ElementTree.fromstring(file.read_text()).tag == "{http://www.w3.org/2000/svg}svg"
    assert "Pareto front" in "".join(ElementTree.fromstring((folder / "pareto-1.svg").read_text()).itertext())


@needs_browser
def test_figures_can_be_pixels(sweep: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "report.html", tmp_path / "figures"
    files = Report.of(sweep / "fedit-1", sweep / "ffa-1").write(one, figures=other, kind="png")
    assert files[0] == one
    for file in files[1:]:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 10  # not an empty sheet


@pytest.mark.parametrize(
    ("hidden", "advice"), [("browser", "apt-get install chromium"), ("playwright", "pip install playwright")]
)
def test_what_is_missing_is_named_and_nothing_is_written(
    hidden: str,
    advice: str,
    sweep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if hidden == "browser":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        without = [place for place in sys.path if not (Path(place) / "playwright").is_dir()]
        monkeypatch.setattr(sys, "path", without)
        monkeypatch.delitem(sys.modules, "playwright", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(sweep), "--figures", "figures"]) == 2
    assert advice in re.sub(r"\s+", " ", capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []
