"""Figures of a report become files that a page on the web can show."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from simulations.published.figures import BROWSERS, main
from simulations.report import Report
from simulations.simulate import start
from tests.conftest import Compose

pytestmark = pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium is installed")


@pytest.fixture
def report(tiny: Compose, tmp_path: Path) -> Path:
    start(tiny("rounds=1"), tmp_path / "run")
    Report.of(tmp_path / "run").write(str(tmp_path / "report.html"), [])
    return tmp_path / "report.html"


def test_the_figures_asked_for_are_pictures_of_their_own(
    report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(report), str(tmp_path / "figures")])
    files = sorted((tmp_path / "figures").iterdir())
    assert [file.name for file in files] == ["clients-1.svg", "pareto-1.svg"]
    assert sorted(capsys.readouterr().out.split()) == [str(file) for file in files]
    for file, words in zip(files, ("worst client", "Pareto front"), strict=True):
        picture = ElementTree.fromstring(file.read_text())
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert words in "".join(picture.itertext())
    with pytest.raises(SystemExit):
        main([str(report), str(tmp_path), "--figures", "nothing"])
    assert "It has: pareto-1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "absent.html"), str(tmp_path)])
    assert "fedlora report RUNS" in capsys.readouterr().err
