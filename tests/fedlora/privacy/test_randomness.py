"""Noise and samples: those of Opacus from a seed, and from the operating system such that nobody can repeat them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from scipy import stats

from fedlora.privacy.randomness import Randomness, Seeded, System
from fedlora.seeding import torch_generator


def test_seeded_draws_are_those_of_opacus() -> None:
    sampler = UniformWithReplacementSampler(
        num_samples=50, sample_rate=0.1, generator=torch_generator(3, "rows"), steps=20
    )
    ours = Seeded(3)
    assert [ours.chosen(50, 0.1).tolist() for _ in range(20)] == list(sampler)
    expected = torch.normal(0.0, 2.5, (7, 5), generator=torch_generator(3, "noise"))
    assert ours.normal((7, 5), 2.5).equal(expected)


@pytest.mark.parametrize("randomness", [Seeded(1), System()], ids=["seeded", "system"])
def test_noise_is_normal_of_the_given_deviation(randomness: Randomness) -> None:
    noise = randomness.normal((400, 500), 3.0)
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy() / 3.0, "norm").pvalue > 1e-4
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], noise.numel()) / noise.numel()
    assert low < float(noise.double().square().mean()) / 9 < high


@pytest.mark.parametrize("randomness", [Seeded(1), System()], ids=["seeded", "system"])
def test_each_row_is_drawn_with_the_same_probability_whatever_the_others(randomness: Randomness) -> None:
    draws = np.zeros((4000, 20), dtype=bool)
    for row in draws:
        row[randomness.chosen(20, 0.1)] = True
    low, high = stats.binom.ppf([1e-7, 1 - 1e-7], 4000, 0.1)
    assert ((low <= draws.sum(0)) & (draws.sum(0) <= high)).all()
    sizes = draws.sum(1)
    assert sizes.min() == 0  # an empty batch is one of the outcomes
    assert 0.85 < sizes.var() / (20 * 0.1 * 0.9) < 1.15  # of independent draws


def test_no_two_draws_of_the_system_are_the_same() -> None:
    first, second = System(), System()
    assert not first.normal((100,), 1.0).equal(second.normal((100,), 1.0))
    assert first.chosen(1000, 0.5).tolist() != second.chosen(1000, 0.5).tolist()


def test_without_deviation_there_is_no_noise() -> None:
    assert Seeded(1).normal((3,), 0.0).equal(torch.zeros(3))
    assert System().normal((3,), 0.0).equal(torch.zeros(3))
