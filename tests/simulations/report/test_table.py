"""Statistics and tables say what the runs say, in every format."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.report import Report, table
from simulations.report.load import load
from simulations.report.summary import front, gap_closed


def summaries(sweep: Path, method: str) -> list[dict]:
    return [json.loads((sweep / f"{method}-{seed}" / "summary.json").read_text()) for seed in (1, 2)]


def test_the_table_has_mean_and_sample_deviation_of_the_summaries(sweep: Path) -> None:
    row = Report.of(sweep).table().set_index("method").loc["fedit"]
    scores = [summary["final"]["metrics"]["seen_accuracy"] for summary in summaries(sweep, "fedit")]
    assert row["seeds"] == 2
    assert row["seen_mean"] == pytest.approx(statistics.mean(scores))
    assert row["seen_sd"] == pytest.approx(statistics.stdev(scores))


def test_references_come_first_and_send_nothing(sweep: Path) -> None:
    found = Report.of(sweep).table()
    assert list(found["method"]) == ["zero_shot", "local", "central", "fedit", "ffa"]
    assert found["bytes_mean"].isna().tolist() == [True] * 3 + [False] * 2


def test_the_csv_is_the_table_unrounded(sweep: Path) -> None:
    found = pd.read_csv(io.StringIO(table.csv(load([sweep]))))
    pd.testing.assert_frame_equal(found.drop(columns="section"), Report.of(sweep).table(), check_dtype=False)


def test_markdown_and_latex_have_every_row(sweep: Path) -> None:
    sections = load([sweep])
    shown = table.cells(sections[0])
    for row in shown.itertuples(index=False, name=None):
        line = next(line for line in table.markdown(sections).splitlines() if line.startswith(f"| {row[0]} "))
        assert [cell.strip() for cell in line.strip("|").split("|")] == list(row)
    text = table.latex(sections)
    assert "\\toprule" in text
    assert "zero\\_shot" in text
    assert "$\\pm$" in text


def test_one_seed_has_no_deviation(sweep: Path) -> None:
    assert not any("±" in cell for cell in table.cells(load([sweep / "fedit-1"])[0]).iloc[0])


def test_the_gap_is_that_of_each_seed() -> None:
    runs = pd.DataFrame(
        [("local", True, 1, 0.5), ("central", True, 1, 0.9), ("a", False, 1, 0.8), ("a", False, 2, 0.8)],
        columns=["kind", "reference", "seed", "score"],
    )
    assert gap_closed(runs).round(9).tolist()[2] == 0.75
    assert gap_closed(runs).isna().tolist() == [True, True, False, True]
    assert gap_closed(runs.assign(score=[0.9, 0.5, 0.8, 0.8])).isna().all()
    assert gap_closed(pd.concat([runs, runs.iloc[:1].assign(score=0.6)], ignore_index=True)).isna().all()


points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(points)
def test_the_front_is_what_no_point_dominates(chosen: list[tuple[int, int]]) -> None:
    found = front(pd.Series([x for x, _ in chosen]), pd.Series([float(y) for _, y in chosen]))
    for (x, y), on_front in zip(chosen, found, strict=True):
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in chosen)
        assert on_front == (not beaten)
