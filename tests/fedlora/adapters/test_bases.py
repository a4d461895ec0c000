from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters.bases import Basis, gradient_basis, seeded_basis, weight_basis

SHAPES = st.tuples(st.integers(2, 12), st.integers(2, 12))
promise = settings(deadline=None, max_examples=30)


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(basis: Basis) -> Tensor:
    return basis.left @ torch.diag(basis.core) @ basis.right


def best(dense: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def assert_orthonormal(rows: Tensor) -> None:
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype), rtol=0, atol=1e-6)


@promise
@given(SHAPES, st.data(), st.integers(0, 1000))
def test_the_gradient_basis_is_the_best_low_rank_first_step(shape, data, seed):
    rank = data.draw(st.integers(1, min(shape)))
    gradient = matrix(shape, seed)
    basis = gradient_basis(gradient, rank, step=0.02)
    dense = -0.02 * torch.sign(gradient)
    # The matrix of signs may have equal singular values, and then several best approximations: compare the error.
    error, least = ((approximation - dense).norm().item() for approximation in (product(basis), best(dense, rank)))
    assert error == pytest.approx(least, rel=1e-6, abs=1e-9)
    assert_orthonormal(basis.left.T)
    assert_orthonormal(basis.right)


def test_the_first_step_goes_against_the_gradient():
    gradient = matrix((7, 5), 1)
    assert (product(gradient_basis(gradient, 2, 0.1)) * gradient).sum() < 0


def test_only_the_sign_of_the_gradient_counts():
    gradient = matrix((7, 5), 1)
    for one, other in zip(gradient_basis(gradient, 2, 0.1), gradient_basis(gradient**3, 2, 0.1), strict=True):
        assert torch.equal(one, other)


@promise
@given(SHAPES, st.data(), st.integers(0, 1000))
def test_the_weight_basis_spans_the_largest_directions_of_the_weight(shape, data, seed):
    rank = data.draw(st.integers(1, min(shape)))
    weight = matrix(shape, seed)
    basis = weight_basis(weight, rank)
    torch.testing.assert_close(basis.left @ basis.right, best(weight, rank), rtol=1e-6, atol=1e-9)
    assert_orthonormal(basis.right)
    torch.testing.assert_close(basis.left.norm(dim=0), torch.linalg.svdvals(weight)[:rank])
    assert not basis.core.any()


@promise
@given(SHAPES, st.data(), st.integers(0, 1000))
def test_the_seeded_basis_is_orthonormal(shape, data, seed):
    rank = data.draw(st.integers(1, min(shape)))
    basis = seeded_basis(*shape, rank, seed, "layer")
    assert basis.left.shape == (shape[0], rank)
    assert basis.right.shape == (rank, shape[1])
    assert_orthonormal(basis.left.T)
    assert_orthonormal(basis.right)
    assert not basis.core.any()


def test_the_seeded_basis_depends_on_seed_and_layer_only():
    first = seeded_basis(8, 6, 3, 1, "a")
    torch.randn(5)
    again, other_seed, other_layer = (
        seeded_basis(8, 6, 3, 1, "a"),
        seeded_basis(8, 6, 3, 2, "a"),
        seeded_basis(8, 6, 3, 1, "b"),
    )
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.right, again.right)
    for other in (other_seed, other_layer):
        assert not torch.allclose(first.left, other.left)
        assert not torch.allclose(first.right, other.right)


@pytest.mark.parametrize("make", [lambda w: weight_basis(w, 4), lambda w: gradient_basis(w, 4, 1.0)])
def test_the_sign_of_each_singular_pair_is_fixed(make):
    basis = make(matrix((9, 6), 3))
    largest = basis.left.gather(0, basis.left.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("make", [lambda w: weight_basis(w, 2), lambda w: gradient_basis(w, 2, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_basis_is_orthonormal_whatever_the_type_of_its_weight(make, dtype):
    basis = make(matrix((5, 4), 0).to(dtype))
    assert basis.left.dtype == basis.right.dtype == torch.float32
    assert_orthonormal(basis.right)
