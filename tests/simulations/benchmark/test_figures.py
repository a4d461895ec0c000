"""The arithmetic behind the tables."""

from __future__ import annotations

from typing import Any

import pytest

from simulations.benchmark import report
from simulations.benchmark.batch_size import candidates, fastest
from simulations.benchmark.bench import append
from simulations.benchmark.figures import figures, loss_difference, share_of_peak, sound


def answers(seconds: list[float], loss: float = 0.5, batch_size: int | None = None) -> dict[str, Any]:
    every = [100.0, *seconds]  # the warm-up must count for nothing
    return {
        "answers": [
            {"seconds": s, "loss": loss, "peak_memory": 10 * n, "batch_size": batch_size, "other_load": 0.01 * n}
            for n, s in enumerate(every)
        ]
    }


def result(**found: dict[str, Any]) -> dict[str, Any]:
    return {
        "workload": "w", "described": "8 clients", "clients": 8, "rows": 32, "tokens": 1000, "flops": 4e9,
        "peaks": {"before": {"fp32": 1e9, "bf16": 8e9}, "after": {"fp32": 2e9, "bf16": 4e9}},
        "variants": {name.replace("_", "-"): each for name, each in found.items()},
    }  # fmt: skip


def line(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    [found] = [each for each in lines if each["name"] == name]
    return found


def test_rates_are_of_the_median_and_leave_out_the_warm_up() -> None:
    found = line(figures(result(loop=answers([1.0, 4.0, 2.0]))), "loop")
    assert found["seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert (found["clients_per_second"], found["tokens_per_second"]) == (4.0, 500.0)
    assert (found["peak_memory"], found["other_load"]) == (30, pytest.approx(0.03))


def test_the_share_of_the_peak_is_nominal_work_by_the_higher_peak() -> None:
    assert share_of_peak(flops=6.0, seconds=2.0, peak=4.0) == 0.75
    lines = figures(result(loop=answers([2.0]), cohort_bf16=answers([2.0])))
    assert line(lines, "loop")["share_of_peak"] == {"fp32": 1.0}
    assert line(lines, "cohort-bf16")["share_of_peak"] == {"fp32": 1.0, "bf16": 0.25}


def test_ratios_are_medians_of_quotients_within_a_repeat() -> None:
    lines = figures(
        result(
            central=answers([1.0, 10.0, 2.0], batch_size=16),
            loop=answers([2.0, 30.0, 8.0]),
            loop_x2=answers([1.0, 1.0, 1.0]),
            cohort=answers([1.0, 20.0, 2.0]),
            cohort_x2=answers([0.5, 0.25, 0.25]),
            own_central=answers([0.5, 10.0, 2.0], batch_size=32),
            flower=answers([3.0, 40.0, 8.0]),
        )
    )
    ratios = line(lines, "cohort")["ratios"]
    assert ratios["speedup_over_loop"] == 2.0  # of 2, 1.5 and 4
    assert ratios["tax_over_central"] == 0.0  # of 0, 1 and 0
    assert ratios["tax_over_own_central"] == 1.0  # of 1, 1 and 0
    assert ratios["speedup_over_flower"] == 3.0  # of 3, 2 and 4
    assert line(lines, "cohort-x2")["ratios"]["speedup_over_loop"] == 4.0  # over the loop with two processes
    assert line(lines, "loop")["ratios"]["speedup_over_loop"] is None
    assert line(lines, "loop")["ratios"]["tax_over_own_central"] is None  # ours is packed, the loop is not


def test_a_variant_that_trained_something_else_is_found_out() -> None:
    assert loss_difference([0.5, 0.4], [0.5, 0.43]) == pytest.approx(0.03)
    right = figures(result(loop=answers([1.0], 0.5), cohort=answers([1.0], 0.50001)))
    assert line(right, "cohort")["loss"]["right"]
    assert sound(right)
    wrong = figures(result(loop=answers([1.0], 0.5), cohort=answers([1.0], 0.51)))
    assert not line(wrong, "cohort")["loss"]["right"]
    assert not sound(wrong)


def test_central_losses_are_compared_at_the_same_batch_size_only() -> None:
    one, other = answers([1.0], 0.5, batch_size=16), answers([1.0], 0.6, batch_size=32)
    assert line(figures(result(central=one, own_central=other)), "own-central")["loss"]["difference"] is None
    same = figures(result(central=one, own_central=answers([1.0], 0.6, batch_size=16)))
    assert line(same, "own-central")["loss"]["difference"] == pytest.approx(0.1)


def test_a_failed_variant_is_reported_and_the_others_are_measured() -> None:
    lines = figures(result(loop=answers([1.0]), cohort={"error": "no such setting"}))
    assert line(lines, "loop")["seconds"]["median"] == 1.0
    assert not sound(lines)
    item = {**result(), "figures": lines}
    assert "`cohort` failed: no such setting" in report.notes(item)
    assert all(len(row) == len(report.HEADER) for row in report.rows(lines))


def test_results_are_appended_as_a_section(tmp_path: Any) -> None:
    found = result(loop=answers([1.0]))
    document = {
        "date": "2026-01-31", "command": "fedlora bench", "machine": "m", "versions": "v", "repeats": 1,
        "workloads": [{**found, "figures": figures(found)}],
    }  # fmt: skip
    path = tmp_path / "RESULTS.md"
    append(path, report.markdown(document))
    append(path, report.markdown({**document, "date": "2026-02-01"}))
    text = path.read_text()
    assert text.count("# Benchmark results") == 1
    assert text.index("## 2026-01-31") < text.index("## 2026-02-01")
    assert "| loop | 1.00 (1.00-1.00) | 8.0 | 1,000 | 200% |" in text


def test_a_batch_size_divides_the_rows_so_that_none_is_trained_on_twice() -> None:
    assert candidates(4096) == (16, 32, 64, 128)
    assert candidates(96) == (16, 32)
    assert candidates(10) == (10,)
    taken: list[tuple[int, int]] = []
    assert fastest(96, lambda size, steps: taken.append((size, steps))) in (16, 32)
    assert taken == [(16, 6), (16, 6), (32, 3)]
