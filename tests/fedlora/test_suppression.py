from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora.suppression import RANK, Request, Score, capacity, rows_of, suppressed

LAYERS = {"a": nn.Linear(24, 6), "b": nn.Linear(40, 8)}


def request(number: int, size: float = 1.0) -> Request:
    rows = rows_of(LAYERS, number, seed=1)
    generator = torch.Generator().manual_seed(number)
    factors = {
        name: size * torch.randn(layer.out_features, RANK, generator=generator) for name, layer in LAYERS.items()
    }
    return Request(rows, factors, Score(torch.zeros(3), 0.0))


def test_rows_are_orthonormal_and_orthogonal_to_those_of_other_requests_however_many_follow() -> None:
    for name in LAYERS:
        rows = torch.cat([rows_of(LAYERS, number, seed=1)[name] for number in range(capacity(LAYERS))])
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-6)
    assert capacity(LAYERS) == 24 // RANK
    assert not torch.equal(rows_of(LAYERS, 0, seed=1)["a"], rows_of(LAYERS, 0, seed=2)["a"])


@pytest.mark.parametrize("shape", [(5, 24), (5, 7, 24)])
def test_every_row_gets_the_dense_sum_of_updates_in_proportion_to_its_scores(shape: tuple[int, ...]) -> None:
    requests = [request(0), request(1)]
    scores = torch.rand(5, 2)
    x, layer = torch.randn(shape), LAYERS["a"]
    with suppressed({"a": layer}, requests, scores):
        found = layer(x)
    for row in range(5):
        dense = sum(scores[row, t] * each.factors["a"] @ each.rows["a"] for t, each in enumerate(requests))
        torch.testing.assert_close(found[row], x[row] @ (layer.weight + dense).T + layer.bias, rtol=1e-4, atol=1e-5)


def test_a_score_of_zero_changes_nothing_and_nothing_stays_behind() -> None:
    x, layer = torch.randn(5, 24), LAYERS["a"]
    before = layer(x)
    with suppressed({"a": layer}, [request(0)], torch.zeros(5, 1)):
        assert torch.equal(layer(x), before)
    with pytest.raises(ValueError, match="stop"), suppressed({"a": layer}, [request(0)], torch.ones(5, 1)):
        raise ValueError("stop")
    assert torch.equal(layer(x), before)


def test_scores_tell_rows_of_the_client_from_others_by_the_posterior_of_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    shift = torch.full((16,), 0.5)
    draw = lambda count: torch.randn(count, 16, generator=generator)  # noqa: E731
    score = Score.fit(draw(4000) + shift, draw(4000))
    x = draw(500)
    expected = torch.sigmoid(x @ shift - 0.5 * shift @ shift)  # of unit covariance and equal priors
    assert (score.of(x) - expected).abs().mean() < 0.03
    assert score.of(draw(500) + shift).mean() > 0.7
    assert score.of(draw(500)).mean() < 0.3


def test_a_client_with_fewer_rows_than_features_has_a_finite_score() -> None:
    score = Score.fit(torch.randn(5, 64) + 1, torch.randn(40, 64))
    assert score.of(torch.randn(100, 64)).isfinite().all()
