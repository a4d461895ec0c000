from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fedlora.errors import InputError
from fedlora.suppression import RANK, Request, Score
from simulations.continual import SuppressedModel
from simulations.forget import forget
from simulations.simulate import start
from tests.conftest import Compose


def ran(tiny: Compose, folder: Path, *overrides: str) -> Path:
    start(tiny("rounds=2", "client.local_epochs=3", "tracking=none", *overrides), folder)
    return folder


def largest(run: Path, count: int) -> list[str]:
    """The largest clients that have trained."""
    train, heard = SuppressedModel(run).federation.index.train, set(pd.read_parquet(run / "ledger.parquet")["client"])
    return sorted(heard, key=lambda client: -len(train[client]))[:count]


@pytest.mark.parametrize("method", ["fedit", "fedex", "fed_sb"])
def test_without_requests_it_is_the_model_of_the_run(tiny: Compose, tmp_path: Path, method: str) -> None:
    run = ran(tiny, tmp_path / "run", f"method={method}")
    model = SuppressedModel(run)
    rows = np.concatenate(list(model.federation.index.unseen.values()))
    target = torch.as_tensor(model.federation.rows.fixed["target"][rows])
    accuracy = float((model.logits(rows).argmax(1) == target).double().mean())
    summary = json.loads((run / "summary.json").read_text())
    assert accuracy == pytest.approx(summary["final"]["metrics"]["test_accuracy"])


def test_requests_one_after_the_other_are_suppressed_and_leave_each_other_as_they_are(
    tiny: Compose, tmp_path: Path
) -> None:
    run = ran(tiny, tmp_path / "run", "method=fedit", "client.lr=1e-2")
    one, two = largest(run, 2)
    adapter = {path: path.read_bytes() for path in (run / "adapter").iterdir()}
    records = [forget(run, one)]
    first = {path: path.read_bytes() for path in (run / "forgotten" / "0").iterdir()}
    records.append(forget(run, two))
    assert all(path.read_bytes() == content for path, content in (adapter | first).items())
    for record in records:
        own = record["groups"]["training rows"]
        assert record["kind"] == "suppression"
        assert own["score"] > 0.5
        assert own["after"]["confidence"] < own["before"]["confidence"]
        assert "not unlearning" in record["text"]
        assert json.loads((run / "forgotten" / str(record["number"]) / "record.json").read_text()) == record
    model = SuppressedModel(run)
    assert len(model.requests) == 2
    for name in model.model.layers:
        a = torch.cat([request.rows[name] for request in model.requests])
        torch.testing.assert_close(a @ a.T, torch.eye(2 * RANK), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=f"client '{one}' was forgotten at"):
        forget(run, one)


def test_a_request_acts_by_its_score_alone(tiny: Compose, tmp_path: Path) -> None:
    run = ran(tiny, tmp_path / "run", "method=ffa")
    (client,) = largest(run, 1)
    forget(run, client)
    model = SuppressedModel(run)
    rows = np.concatenate(list(model.federation.index.test.values()))
    request = model.requests[0]
    never = Request(request.rows, request.factors, Score(torch.zeros_like(request.score.weight), -1e4))
    assert torch.equal(model.logits(rows, [never]), model.logits(rows, []))
    always = Request(request.rows, request.factors, Score(torch.zeros_like(request.score.weight), 1e4))
    merged = {name: request.factors[name] @ request.rows[name] for name in request.rows}
    found = model.logits(rows, [always])
    model.model.set_base_correction(merged)  # the dense update, in every layer
    torch.testing.assert_close(model.logits(rows, []), found, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_suppressed_is_refused_and_nothing_is_written(
    tiny: Compose, tiny_lm: Compose, tmp_path: Path
) -> None:
    run = ran(tiny, tmp_path / "run", "method=ffa", "rounds=1")
    with pytest.raises(InputError, match=r"there is no training client 'site 99'. Did you mean 'site"):
        forget(run, "site 99")
    idle = min(set(SuppressedModel(run).federation.clients) - set(pd.read_parquet(run / "ledger.parquet")["client"]))
    with pytest.raises(InputError, match="trained in no round of this run"):
        forget(run, idle)
    with pytest.raises(InputError, match="leaves no single model"):
        forget(ran(tiny, tmp_path / "personal", "method=fedsa"), "site 00")
    start(tiny_lm("method=ffa", "rounds=1", "tracking=none"), tmp_path / "lm")
    with pytest.raises(InputError, match="has no classes"):
        forget(tmp_path / "lm", "s1")
    assert not list(tmp_path.glob("*/forgotten"))
