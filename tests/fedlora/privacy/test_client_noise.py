"""What a client sends when it is asked to clip its update and to add its share of the noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from fedlora.client import Worker
from fedlora.federation import Federation
from fedlora.privacy.client_level import update_of
from fedlora.protocol import CLIP, NOISE
from fedlora.store import ClientStore
from tests.conftest import Compose
from tests.fedlora.test_client import message_to, returned


def update(worker: Worker, client: str = "site 03", server_round: int = 1, **asked: float) -> Tensor:
    """The update that ``client`` sends, ``[numbers]``."""
    sent = worker.model.read(worker.model.shared)
    reply = worker.handle(message_to(worker, client, server_round, sent, **asked))
    return update_of(returned(worker, reply), sent)


@pytest.fixture
def worker(tiny: Compose, tmp_path: Path) -> Worker:
    return Worker(Federation(tiny("method=ffa", "client.lr=1e-2")), ClientStore(tmp_path / "clients"))


def test_a_client_clips_its_whole_update(worker: Worker) -> None:
    worker.reset()
    whole = update(worker)
    worker.reset()
    short = update(worker, **{CLIP: float(whole.norm()) / 3, NOISE: 0.0})
    torch.testing.assert_close(short, whole / 3, rtol=0, atol=1e-6)
    worker.reset()
    torch.testing.assert_close(update(worker, **{CLIP: 100.0, NOISE: 0.0}), whole, rtol=0, atol=1e-6)


def test_a_client_adds_noise_of_its_own_in_every_round(worker: Worker) -> None:
    noises = []
    for client, server_round in (("site 03", 1), ("site 06", 1), ("site 03", 2)):
        pair = []
        for deviation in (0.0, 0.5):
            worker.reset()
            pair.append(update(worker, client, server_round, **{CLIP: 0.1, NOISE: deviation}))
        noises.append(pair[1] - pair[0])
        statistic, freedom = float(noises[-1].square().sum()) / 0.5**2, noises[-1].numel()
        assert chi2.ppf(1e-6, freedom) < statistic < chi2.ppf(1 - 1e-6, freedom)
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(torch.stack([noises[one], noises[two]]))[0, 1])) < 0.25


def test_a_deployed_client_draws_noise_that_nobody_can_draw_again(tiny: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny("method=ffa")), ClientStore(tmp_path / "clients"), deployed=True)
    first, second = (update(worker, **{CLIP: 0.1, NOISE: 0.5}) for _ in range(2))
    assert float((first - second).norm()) > 1
