from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.lowrank import LowRank, RunningSum, as_factors, relative_distance, weighted_mean

RANKS = st.integers(0, 12)  # from no update at all to more than min(m, n)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda shape: shape[0] != shape[1])
SEEDS = st.integers(0, 2**32)

promise = settings(deadline=None, max_examples=60)


def random_update(shape: tuple[int, int], rank: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    return LowRank(left.to(dtype), right.to(dtype))


def clients(shape: tuple[int, int], ranks: list[int], seed: int) -> list[LowRank]:
    return [random_update(shape, rank, seed + index) for index, rank in enumerate(ranks)]


def fractions(matrix: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in matrix.double().tolist()]


def exact_dense(delta: LowRank) -> list[list[Fraction]]:
    """Multiply out in rational arithmetic."""
    columns = list(zip(*fractions(delta.right), strict=True))
    return [
        [sum((a * b for a, b in zip(row, column, strict=True)), Fraction()) for column in columns]
        for row in fractions(delta.left)
    ]


def exact_distance(first: LowRank, second: LowRank) -> float:
    """Compute ‖dW − dW'‖_F in rational arithmetic up to the last square root."""
    rows = zip(exact_dense(first), exact_dense(second), strict=True)
    squares = ((a - b) ** 2 for row in rows for a, b in zip(*row, strict=True))
    return math.sqrt(sum(squares, Fraction()))


def best_error(matrix: Tensor, rank: int) -> float:
    """Return the error of the best rank-r approximation of a dense matrix (Eckart and Young, 1936)."""
    return torch.linalg.svdvals(matrix)[rank:].norm().item()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@promise
@given(SHAPES, RANKS, RANKS, SEEDS, st.floats(-10, 10))
def test_linear_operations_agree_with_dense_matrices(shape, rank, other_rank, seed, factor):
    first, second = clients(shape, [rank, other_rank], seed)

    assert first.shape == shape
    assert first.rank == rank
    assert (first + second).rank == rank + other_rank
    assert_same(first.dense(), first.left @ first.right)
    assert_same(first.scale(factor).dense(), factor * first.dense())
    assert_same((first + second).dense(), first.dense() + second.dense())
    assert_same((first - second).dense(), first.dense() - second.dense())
    assert_same(LowRank.sum([first, second, first]).dense(), 2 * first.dense() + second.dense())


@promise
@given(SHAPES, RANKS, RANKS, SEEDS)
def test_measures_agree_with_dense_matrices(shape, rank, other_rank, seed):
    first, second = clients(shape, [rank, other_rank], seed)

    assert first.inner(second) == pytest.approx((first.dense() * second.dense()).sum().item(), rel=1e-10, abs=1e-10)
    assert first.norm() == pytest.approx(first.dense().norm().item(), rel=1e-12)
    assert first.distance(second) == pytest.approx((first.dense() - second.dense()).norm().item(), rel=1e-12)


@promise
@given(SHAPES, RANKS, SEEDS)
def test_sizes_count_the_numbers_that_would_travel(shape, rank, seed):
    delta = random_update(shape, rank, seed)

    assert delta.factored_size() == delta.left.numel() + delta.right.numel()
    assert delta.dense_size() == delta.dense().numel()


@promise
@given(SHAPES, RANKS, RANKS, SEEDS)
def test_truncation_is_the_best_approximation_of_its_rank(shape, rank, kept, seed):
    delta = random_update(shape, rank, seed)

    truncated = delta.truncate(kept)

    assert truncated.shape == shape
    assert truncated.rank == min(kept, rank, *shape)
    assert (delta.dense() - truncated.dense()).norm().item() == pytest.approx(
        best_error(delta.dense(), kept), rel=1e-9, abs=1e-12
    )


@promise
@given(SHAPES, st.integers(1, 12), SEEDS)
def test_truncation_shares_the_singular_values_between_the_factors(shape, rank, seed):
    truncated = random_update(shape, rank, seed).truncate(2)

    assert_same(truncated.left.norm(dim=0), truncated.right.norm(dim=1))


@promise
@given(SHAPES, st.lists(RANKS, min_size=1, max_size=5), SEEDS, st.data())
def test_mean_is_exact_with_unequal_weights_and_ranks(shape, ranks, seed, data):
    deltas = clients(shape, ranks, seed)
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(ranks), max_size=len(ranks)))
    expected = sum(
        (weight / sum(weights) * delta.dense() for weight, delta in zip(weights, deltas, strict=True)),
        torch.zeros(shape, dtype=torch.float64),
    )

    mean = LowRank.mean(deltas, weights)

    assert mean.rank == sum(ranks)
    assert_same(mean.dense(), expected)


def test_mean_folds_each_weight_into_one_factor_only():
    deltas, weights = clients((12, 8), [3, 3, 3], seed=0), [0.5, 0.3, 0.2]
    dense = torch.stack([weight * delta.dense() for weight, delta in zip(weights, deltas, strict=True)]).sum(0)
    expected = LowRank(dense, torch.eye(8, dtype=torch.float64))
    on_both = LowRank.sum([LowRank(d.left * w, d.right * w) for d, w in zip(deltas, weights, strict=True)])

    assert relative_distance({"w": expected}, {"w": LowRank.mean(deltas, weights)}) < 1e-14
    assert relative_distance({"w": expected}, {"w": on_both}) > 0.1


def test_the_mean_of_factors_is_not_the_mean_of_updates():
    deltas = clients((12, 8), [3, 3], seed=0)
    averaged = LowRank((deltas[0].left + deltas[1].left) / 2, (deltas[0].right + deltas[1].right) / 2)

    assert relative_distance({"w": LowRank.mean(deltas, [1, 1])}, {"w": averaged}) > 0.1


@promise
@given(SHAPES, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 5), SEEDS)
def test_flexlora_keeps_the_best_approximation_of_the_mean(shape, ranks, kept, seed):
    deltas = clients(shape, ranks, seed)
    weights = list(range(1, len(ranks) + 1))
    mean = sum((w / sum(weights) * d.dense() for w, d in zip(weights, deltas, strict=True)), torch.zeros(shape))
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)

    kept_by_us = LowRank.mean(deltas, weights).truncate(kept)

    torch.testing.assert_close(kept_by_us.dense(), (u[:, :kept] * s[:kept]) @ vh[:kept], rtol=1e-6, atol=1e-6)
    assert (mean - kept_by_us.dense()).norm().item() == pytest.approx(best_error(mean, kept), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", [(16, 11), (5, 4)], ids=["triangles", "dense"])
@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-6])
def test_distance_of_nearly_equal_updates_does_not_cancel(shape, gap):
    first = random_update(shape, 3, seed=1)
    rotation = torch.linalg.qr(random_update((3, 3), 3, seed=2).dense()).Q
    moved = LowRank(first.left + gap * random_update(shape, 3, seed=3).left, first.right)
    second = LowRank(moved.left @ rotation, rotation.T @ moved.right)

    assert first.distance(second) == pytest.approx(exact_distance(first, second), rel=1e-9)


def test_the_gram_formula_would_cancel():
    first = random_update((16, 11), 3, seed=1)
    second = LowRank(first.left + 1e-6 * random_update((16, 11), 3, seed=3).left, first.right)
    by_gram = math.sqrt(max(0.0, first.inner(first) - 2 * first.inner(second) + second.inner(second)))

    assert by_gram != pytest.approx(exact_distance(first, second), rel=1e-6)


def test_distance_of_two_factorizations_of_one_update_is_rounding_only():
    first = random_update((16, 11), 3, seed=1)
    second = LowRank(first.left * 1024.0, first.right / 1024.0)

    assert first.distance(second) <= 1e-14 * first.norm()


@pytest.mark.parametrize("shape", [(16, 11), (5, 3)], ids=["triangles", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_dtype_is_kept_and_measures_are_made_in_fp64(dtype, shape):
    first, second = (random_update(shape, 3, seed, dtype) for seed in (1, 2))
    results = [first.scale(0.5), first + second, LowRank.mean([first, second], [1, 2]), first.truncate(2)]
    gap, size = exact_distance(first, second), exact_distance(first, first.scale(0.0))

    assert {factor.dtype for delta in results for factor in (delta.left, delta.right)} == {dtype}
    assert first.norm() == pytest.approx(size, rel=1e-12)
    assert first.distance(second) == pytest.approx(gap, rel=1e-12)
    assert first.inner(first) == pytest.approx(size**2, rel=1e-12)
    assert relative_distance({"w": first}, {"w": second}) == pytest.approx(gap / size, rel=1e-12)


def test_shapes_are_known_on_the_meta_device():
    with torch.device("meta"):
        first, second = (LowRank(torch.empty(6, rank), torch.empty(rank, 4)) for rank in (2, 3))
    zeros = LowRank.zeros(6, 4, device="meta")
    mean = LowRank.mean([first.scale(2.0), second + zeros], [1, 3])

    assert (mean.shape, mean.rank, mean.factored_size(), mean.left.device.type) == ((6, 4), 5, 50, "meta")


def test_zeros_is_the_neutral_element_of_the_sum():
    delta, zeros = random_update((6, 4), 2, seed=0), LowRank.zeros(6, 4, dtype=torch.float64)

    assert (zeros.rank, zeros.norm(), zeros.truncate(3).rank, zeros.factored_size()) == (0, 0.0, 0, 0)
    assert torch.equal(zeros.dense(), torch.zeros(6, 4, dtype=torch.float64))
    assert torch.equal((delta + zeros).dense(), delta.dense())


def test_operands_are_not_modified():
    first, second = clients((6, 4), [2, 3], seed=0)
    before = [tensor.clone() for delta in (first, second) for tensor in (delta.left, delta.right)]

    LowRank.mean([first, second], [1, 2]).truncate(2)
    first.scale(3.0).distance(second)

    after = [tensor for delta in (first, second) for tensor in (delta.left, delta.right)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("left", "right"), [((4, 2), (3, 5)), ((4,), (4, 5)), ((4, 2), (2,)), ((1, 4, 2), (2, 5))], ids=str
)
def test_factors_that_cannot_be_multiplied_are_refused(left, right):
    with pytest.raises(ValueError, match="needs left"):
        LowRank(torch.zeros(left), torch.zeros(right))


def test_updates_of_different_weights_do_not_mix():
    first, second = random_update((6, 4), 2, seed=0), random_update((1, 4), 2, seed=0)

    for operation in (first.__add__, first.__sub__, first.inner, first.distance):
        with pytest.raises(ValueError, match=r"\[6, 4\]"):
            operation(second)
    with pytest.raises(ValueError, match="update 1 has shape"):
        LowRank.mean([first, second], [1, 1])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one weight for each"),
        ([1.0, 1.0, 1.0], "one weight for each"),
        ([0.0, 0.0], "more than 0"),
        ([2.0, -1.0], "not negative"),
        ([1.0, math.nan], "finite"),
        ([1.0, math.inf], "finite"),
    ],
)
def test_weights_that_describe_no_mean_are_refused(weights, message):
    deltas = clients((6, 4), [2, 2], seed=0)

    with pytest.raises(ValueError, match=message):
        LowRank.mean(deltas, weights)
    with pytest.raises(ValueError, match=message):
        weighted_mean([{"w": delta} for delta in deltas], weights)


def test_combining_nothing_is_refused():
    for combine in (lambda: LowRank.mean([], []), lambda: weighted_mean([], []), lambda: LowRank.sum([])):
        with pytest.raises(ValueError, match="at least one"):
            combine()


def test_truncating_below_rank_zero_is_refused():
    with pytest.raises(ValueError, match="rank -1"):
        random_update((6, 4), 2, seed=0).truncate(-1)


@promise
@given(SHAPES, SHAPES, RANKS, RANKS, SEEDS)
def test_relative_distance_measures_all_modules_together(shape, other_shape, rank, other_rank, seed):
    expected = {"a": random_update(shape, rank + 1, seed), "b": random_update(other_shape, other_rank, seed + 1)}
    actual = {"b": random_update(other_shape, rank, seed + 2), "a": random_update(shape, other_rank, seed + 3)}
    gap = torch.cat([(expected[name].dense() - actual[name].dense()).flatten() for name in "ab"]).norm()
    size = torch.cat([expected[name].dense().flatten() for name in "ab"]).norm()

    assert relative_distance(expected, actual) == pytest.approx((gap / size).item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(24, 17), (5, 4)], ids=["triangles", "dense"])
def test_the_aggregation_error_of_an_exact_aggregate_is_rounding_only(shape):
    cohort = [{"w": delta} for delta in clients(shape, [2, 1, 3], seed=5)]
    weights = [1, 2, 4]
    mean = weighted_mean(cohort, weights)
    refactored = {"w": mean["w"].truncate(6)}
    nudged = {"w": mean["w"] + random_update(shape, 1, seed=9).scale(1e-9)}

    assert relative_distance(mean, refactored) < 1e-14
    assert relative_distance(mean, nudged) == pytest.approx(
        exact_distance(mean["w"], nudged["w"]) / mean["w"].norm(), rel=1e-5
    )


def test_relative_distance_of_zero_updates():
    zero, some = {"w": LowRank.zeros(6, 4)}, {"w": random_update((6, 4), 2, seed=0)}

    assert relative_distance(zero, zero) == 0.0
    assert relative_distance({}, {}) == 0.0
    assert relative_distance(zero, some) == math.inf
    assert relative_distance(some, zero) == pytest.approx(1.0, rel=1e-15)


def test_relative_distance_does_not_hide_a_broken_update():
    some, broken = random_update((6, 4), 2, seed=0), random_update((6, 4), 2, seed=0)
    broken.left[0, 0] = math.nan

    assert math.isnan(relative_distance({"w": some}, {"w": broken}))
    assert math.isnan(relative_distance({"w": broken}, {"w": some}))


def test_every_module_is_averaged_with_its_own_updates():
    cohort = [
        {"query": random_update((6, 4), 2, seed), "value": random_update((3, 7), 1, seed + 10)} for seed in range(3)
    ]
    mean = weighted_mean(cohort, [1, 1, 2])

    assert list(mean) == ["query", "value"]
    for name in mean:
        expected = (cohort[0][name].dense() + cohort[1][name].dense() + 2 * cohort[2][name].dense()) / 4
        assert_same(mean[name].dense(), expected)


def test_different_modules_are_refused_by_name():
    both = {"query": random_update((6, 4), 2, 0), "value": random_update((3, 7), 1, 1)}
    one = {"query": both["query"]}

    with pytest.raises(ValueError, match="value"):
        weighted_mean([one, both], [1, 1])
    with pytest.raises(ValueError, match="value"):
        relative_distance(both, one)
    with pytest.raises(ValueError, match="module query"):
        relative_distance(one, {"query": random_update((1, 4), 2, 0)})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (None, 5e-7)], ids=["fp64", "fp32"])
def test_a_mean_over_a_thousand_clients_is_exact_and_no_larger_than_one_weight(dtype, tolerance):
    cohort = [{"w": random_update((384, 384), 8, seed, torch.float32)} for seed in range(1000)]
    weights = list(range(1, 1001))
    mean = weighted_mean(iter(cohort), weights, dtype)
    reference = torch.zeros(384, 384, dtype=torch.float64)
    for client, weight in zip(cohort, weights, strict=True):
        reference += (client["w"].left.double() @ client["w"].right.double()) * (weight / sum(weights))
    expected = {"w": LowRank(reference, torch.eye(384, dtype=torch.float64))}

    assert mean["w"].rank == 384
    assert mean["w"].left.dtype == (dtype or torch.float32)
    assert relative_distance(expected, mean) < tolerance


def test_updates_with_one_right_factor_share_it_in_their_sum():
    right = random_update((6, 40), 2, seed=0).right
    deltas = [LowRank(random_update((6, 40), 2, seed).left, right) for seed in range(5)]
    other = random_update((6, 40), 1, seed=9)
    total = RunningSum(torch.float64)
    for factor, delta in enumerate([*deltas, other], 1):
        total.add(delta, factor)

    assert total.value().rank == 3
    products = [f * d.dense() for f, d in enumerate([*deltas, other], 1)]
    assert_same(total.value().dense(), torch.stack(products).sum(0))


@promise
@given(SHAPES, st.lists(RANKS, min_size=1, max_size=8), SEEDS)
def test_a_running_sum_is_the_sum_and_never_larger_than_the_weight(shape, ranks, seed):
    deltas = clients(shape, ranks, seed)
    total = RunningSum(torch.float64)
    for factor, delta in enumerate(deltas, 1):
        total.add(delta, factor)

    products = [factor * delta.dense() for factor, delta in enumerate(deltas, 1)]
    assert_same(total.value().dense(), torch.stack(products).sum(0))
    assert total.value().rank <= min(shape)


@pytest.mark.parametrize("shape", [(96, 80), (80, 96)], ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.01], ids=str)
def test_the_leading_components_of_a_large_dense_update_are_the_best(shape, decay):
    delta = random_update(shape, 80, seed=4)
    spread = LowRank(delta.left * decay ** torch.arange(80), torch.linalg.qr(delta.right.T).Q.T)
    dense, truncated = spread.dense(), spread.truncate(6)
    error, size = (dense - truncated.dense()).norm().item(), dense.norm().item()

    assert (truncated.rank, truncated.shape) == (6, shape)
    assert error == pytest.approx(best_error(dense, 6), rel=1e-9, abs=1e-7 * size)
    assert truncated.left.norm(dim=0).tolist() == pytest.approx(truncated.right.norm(dim=1).tolist(), rel=1e-9)
    assert truncated.left.norm(dim=0).tolist() == sorted(truncated.left.norm(dim=0).tolist(), reverse=True)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
def test_an_update_that_is_dense_already_is_not_multiplied_but_copied(shape):
    dense = random_update(shape, 3, seed=0).dense()
    delta = as_factors(dense)

    assert torch.equal(delta.dense(), dense)
    assert delta.dense().data_ptr() != dense.data_ptr()
    assert delta.rank == 4


@pytest.mark.parametrize("n", [5, 200])
def test_an_update_is_seen_through_directions_as_its_product_with_them(n):
    delta, directions = random_update((12, n), 3, seed=0), random_update((n, 4), 4, seed=1).dense()

    assert delta.through(directions).shape == (12, 4)
    assert_same(delta.through(directions).dense(), delta.dense() @ directions)
