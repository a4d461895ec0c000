"""The command and the object of notebooks: figures, and one paragraph for every mistake with nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.cli import main, sort_arguments
from simulations.report import Report
from simulations.report.figures import PICTURES
from simulations.report.style import styles


def test_a_notebook_has_every_figure(sweep: Path) -> None:
    figures = Report.of(sweep).figures()
    # a gap only where central beats local, sensitivity only of tuned sweeps, epsilon only of private runs
    expected = {picture.name for picture in PICTURES} - {"gap", "sensitivity", "epsilon"}
    assert expected <= set(figures)
    assert figures["pareto"].layout["xaxis"]["type"] == "log"


def test_a_lone_reference_has_no_pareto_front(sweep: Path) -> None:
    figures = Report.of(sweep / "zero_shot-1").figures()
    assert "pareto" not in figures
    assert "clients" in figures


def test_the_page_says_where_seeds_do_not_support_a_comparison(sweep: Path) -> None:
    uneven, one = "Not every method has every seed", "One seed: a demonstration"
    for runs, expected in ((["*"], []), (["ffa-*", "fedit-1"], [uneven]), (["ffa-1", "fedit-1"], [one])):
        html = Report.of(*(sweep / name for name in runs)).html()
        assert [text for text in (uneven, one) if text in html] == expected


def test_no_two_methods_look_alike() -> None:
    names = [f"method {number}" for number in range(24)]
    assert len(set(styles(names, []).values())) == 24


def test_names_of_files_may_contain_an_equals_sign() -> None:
    assert sort_arguments(["report", "runs/seed=1", "-o", "x"]) == (["report", "runs/seed=1", "-o", "x"], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "There is no run at 'nowhere'"),
        (["."], "holds no run"),
        (["SWEEP", "-o", "no/report.html"], "does not exist"),
        (["SWEEP", "-o", "."], "is a folder"),
        (["SWEEP", "--table", "table.xlsx"], "should end in .csv, .md, .tex"),
        (["SWEEP", "--table", "no/table.csv"], "does not exist"),
        (["SWEEP", "--figures", "no/figures"], "does not exist"),
        (["SWEEP", "--figures", __file__], "is a file"),
        (["SWEEP/local-1", "--on", "test"], "No run has accuracy on rows of unseen clients"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_paragraph_and_leaves_nothing(
    arguments: list[str],
    message: str,
    sweep: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *(argument.replace("SWEEP", str(sweep)) for argument in arguments)]) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
