from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from simulations.paired import holm, paired_differences

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_holm_gives_the_numbers_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(P_VALUES)
def test_holm_is_between_the_p_value_and_bonferroni_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p, found in zip(p_values, corrected, strict=True):
        assert p <= found <= min(1.0, len(p_values) * p)
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()


def test_differences_are_taken_within_each_seed() -> None:
    noise = {seed: float(value) for seed, value in enumerate(np.random.default_rng(0).normal(0, 10, 6))}
    better = {seed: value + 1 + 0.01 * seed for seed, value in noise.items()}
    (found,) = paired_differences({"a": noise, "b": better}, "a")
    assert (found.method, found.seeds) == ("b", 6)
    assert found.mean == pytest.approx(1.025)
    assert 1 < found.low < found.mean < found.high < 1.05
    assert found.p < 1e-6


def test_the_p_value_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(0, 1, 5), rng.normal(0.5, 1, 5)
    (found,) = paired_differences({"a": dict(enumerate(one)), "b": dict(enumerate(two))}, "a")
    assert found.p == pytest.approx(stats.ttest_rel(two, one).pvalue)  # pyright: ignore


def test_only_common_seeds_count_and_two_are_needed() -> None:
    values = {"a": {1: 0.5, 2: 0.6, 3: 0.7}, "b": {2: 0.7, 3: 0.9, 4: 0.0}, "c": {3: 0.9}}
    assert [(d.method, d.seeds, round(d.mean, 3)) for d in paired_differences(values, "a")] == [("b", 2, 0.15)]


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        values = {"a": dict(enumerate(rng.normal(0, 1, 5))), "b": dict(enumerate(rng.normal(1, 1, 5)))}
        (found,) = paired_differences(values, "a")
        covered += found.low <= 1 <= found.high
    assert 0.92 < covered / 400 < 0.98


def test_differences_that_are_the_same_but_for_rounding_have_no_spread() -> None:
    values = {"a": {1: 0.7, 2: 0.4, 3: 0.2}, "b": {1: 0.8, 2: 0.5, 3: 0.3}}
    (found,) = paired_differences(values, "a")
    assert found.low == found.mean == found.high == pytest.approx(0.1)


def test_equal_results_are_no_difference() -> None:
    (found,) = paired_differences({"a": {1: 0.5, 2: 0.6}, "b": {1: 0.5, 2: 0.6}}, "a")
    assert (found.mean, found.low, found.high, found.p_holm) == (0, 0, 0, 1)
