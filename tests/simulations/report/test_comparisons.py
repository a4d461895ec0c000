"""Figures that compare: differences over seeds, the tuned setting, and clients."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulations.paired import paired_differences
from simulations.report import Report
from simulations.report.clients import POINTS
from simulations.report.load import load


def drawn_by(report: Report, name: str) -> Any:
    """A figure, whose own annotations a type checker cannot follow."""
    return report.figures()[name]


def test_differences_are_the_paired_ones_of_the_scores(sweep: Path) -> None:
    report = Report.of(sweep)
    runs = report.sections[0].runs
    scores = {str(name): dict(zip(own["seed"], own["score"], strict=True)) for name, own in runs.groupby("method")}
    expected = {each.method: each for each in paired_differences(scores, "fedit")}
    figure = drawn_by(report, "differences")
    drawn = {trace.name: trace for trace in figure.data if trace.x[0] is not None}
    assert set(drawn) == set(expected) == {"zero_shot", "local", "central", "ffa"}
    for name, trace in drawn.items():
        assert trace.x[0] == expected[name].mean
        assert trace.x[0] + trace.error_x.array[0] == pytest.approx(expected[name].high)
        assert trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(expected[name].low)


def test_methods_whose_interval_holds_zero_are_hollow_and_others_are_not(sweep: Path) -> None:
    (section,) = load([sweep])
    scores = {"fedit": (0.5, 0.6), "central": (0.8, 0.901), "local": (0.2, 0.301), "ffa": (0.4, 0.7)}
    scores["zero_shot"] = (0.625, 0.725)  # 0.125 better in both
    score = [scores[run.method][run.seed - 1] for run in section.runs.itertuples()]
    figure = drawn_by(Report([replace(section, runs=section.runs.assign(score=score))]), "differences")
    symbols = {trace.name: trace.marker.symbol for trace in figure.data}
    texts = {note.y: note.text for note in figure.layout.annotations}
    verdicts = {"central": "better", "local": "worse", "ffa": "not told apart", "zero_shot": "no spread"}
    for name, verdict in verdicts.items():
        assert symbols[name] == ("circle" if verdict in ("better", "worse") else "circle-open")
        assert texts[name].endswith(verdict)


def test_one_seed_or_no_method_that_communicates_shows_no_differences(sweep: Path) -> None:
    for runs in (["fedit-1", "ffa-1"], ["fedit-1", "ffa-2"], ["local-*", "central-*"], ["fedit-*"]):
        assert "differences" not in Report.of(*(sweep / name for name in runs)).figures()


def test_sensitivity_is_the_curve_that_each_method_chose_from(tuned: Path) -> None:
    figure = drawn_by(Report.of(tuned), "sensitivity")
    assert figure.layout.xaxis.type == "log"
    for method in json.loads((tuned / "comparison.json").read_text())["methods"]:
        lines = [trace for trace in figure.data if trace.name == method["label"]]
        assert list(lines[0].x) == [float(value) for value in method["curve"]]
        assert list(lines[0].y) == list(method["curve"].values())
        for ring in lines[1:]:
            assert list(ring.x) == [float(method["value"])]
            assert list(ring.y) == [max(method["curve"].values())]


@pytest.mark.parametrize("other", ["0", "none"])
def test_values_that_have_no_logarithm_are_names(tuned: Path, tmp_path: Path, other: str) -> None:
    shutil.copytree(tuned, tmp_path / "sweep")
    file = tmp_path / "sweep" / "comparison.json"
    file.write_text(file.read_text().replace('"0.0001"', f'"{other}"'))
    assert drawn_by(Report.of(tmp_path / "sweep"), "sensitivity").layout.xaxis.type == "category"


def test_a_sweep_that_is_not_tuned_has_no_sensitivity(sweep: Path) -> None:
    assert "sensitivity" not in Report.of(sweep).figures()


def test_the_page_of_a_tuned_sweep_says_what_was_chosen_and_left_out(tuned: Path) -> None:
    html = " ".join(Report.of(tuned).html().split())
    assert "Each method with the client.lr that it chose on validation rows; 3 other trials" in html


def test_every_client_of_every_seed_is_a_point(sweep: Path) -> None:
    report = Report.of(sweep)
    values = report.sections[0].clients.groupby("method")["value"]
    boxes = {trace.name: trace for trace in drawn_by(report, "clients").data if trace.type == "box"}
    assert set(boxes) == set(report.sections[0].runs["method"])
    for name, box in boxes.items():
        assert sorted(box.x) == sorted(values.get_group(name))


def test_of_many_clients_the_points_keep_ends_and_quartiles(sweep: Path) -> None:
    (section,) = load([sweep / "fedit-1"])
    values = np.random.default_rng(0).normal(0.5, 0.1, 20 * POINTS)
    many = section.clients.iloc[np.zeros(len(values), dtype=int)].assign(value=values)
    (box,) = [t for t in drawn_by(Report([replace(section, clients=many)]), "clients").data if t.type == "box"]
    assert len(box.x) == POINTS
    levels = [0, 0.25, 0.5, 0.75, 1]
    assert np.quantile(box.x, levels) == pytest.approx(np.quantile(values, levels), abs=2e-3)
