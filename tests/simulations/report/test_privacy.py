"""The picture of score against epsilon has the numbers of the summaries, a line a method, and what no privacy gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simulations.compose import compose_config
from simulations.report import Report
from simulations.simulate import start


@pytest.fixture(scope="module")
def private(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    usual = [*tiny_overrides, "adapter.rank=4", "method=ffa", "tracking=none", "rounds=1"]
    for seed in (1, 2):
        start(compose_config([*usual, f"seed={seed}"]), folder / f"public-{seed}")
        for epsilon in (8, 2):
            settings = [*usual, f"seed={seed}", "privacy=record", f"privacy.epsilon={epsilon}"]
            start(compose_config(settings), folder / f"{epsilon}-{seed}")
    return folder


def test_score_against_epsilon_has_the_numbers_of_the_summaries(private: Path) -> None:
    figure = Report.of(private).figures()["epsilon"]
    line, public = figure.data
    assert line.name == "ffa, each record"
    for place, epsilon in enumerate((2, 8)):
        found = [json.loads((private / f"{epsilon}-{seed}" / "summary.json").read_text()) for seed in (1, 2)]
        assert line.x[place] == pytest.approx(np.mean([summary["privacy"]["epsilon"] for summary in found]))
        scores = [summary["final"]["metrics"]["seen_accuracy"] for summary in found]
        assert line.y[place] == pytest.approx(np.mean(scores))
        assert line.error_y.array[place] == pytest.approx(np.std(scores, ddof=1))
    assert public.name == "ffa, without privacy"
    assert public.line.dash != line.line.dash or public.line.color != line.line.color


def test_there_is_no_such_picture_of_runs_without_privacy(private: Path) -> None:
    assert "epsilon" not in Report.of(private / "public-*").figures()
