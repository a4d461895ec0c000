"""The predicted peak memory of a run against the peak of a process that ran it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedlora.federation import Federation
from simulations.memory import LiveBytes, evaluation_bytes, step_bytes, weight_bytes
from tests.conftest import Compose


def test_live_bytes_counts_what_is_alive_at_once() -> None:
    weight = torch.zeros(10, 10)
    with LiveBytes([weight]) as live:
        one = torch.ones(1000) * 2  # two tensors of 4,000 bytes, the first of which dies
        gc.collect()
        assert live.now == 4000
        two = torch.ones(500)
        view = weight.view(100)
    assert (live.now, live.peak) == (6000, 8000)
    del one, two, view
    assert live.now == 0


def test_live_bytes_keeps_what_the_backward_pass_needs() -> None:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)]).to("meta")
    x = torch.empty(100, 8, device="meta")
    with LiveBytes(layers.parameters()) as live:
        y = layers(x)
        kept = live.now
        with torch.no_grad():
            layers(x)
    assert kept >= 5 * 100 * 8 * 4  # tanh keeps its output
    assert live.peak < 2 * kept
    del y


def test_weights_count_by_how_they_are_held(tiny: Compose) -> None:
    federation = Federation(tiny())
    model = federation.build_meta_model()
    plain = weight_bytes(federation, model)
    assert plain == 4 * sum(p.numel() for p in model.module.parameters())
    federation.config = tiny("backbone.quantization=nf4")
    assert weight_bytes(federation, model) < plain


def test_longer_batches_need_more_and_checkpointing_needs_less(tiny: Compose) -> None:
    def needed(*overrides: str) -> int:
        federation = Federation(tiny("client.batch_size=16", *overrides))
        return step_bytes(federation, federation.build_meta_model())

    base = needed()
    assert needed("client.batch_size=32") > 1.5 * base
    assert needed("client.optimizer=sgd") < base


def test_an_evaluation_step_needs_less_than_a_training_step_of_its_size(tiny: Compose) -> None:
    federation = Federation(tiny("client.batch_size=32", "eval.batch_size=32"))
    model = federation.build_meta_model()
    assert 0 < evaluation_bytes(federation, model) < step_bytes(federation, model)


WORK = [
    "rounds=1", "cohort.size=1", "client.local_steps=1", "eval.max_rows=32", "eval.max_clients=1", "engine.threads=2",
]  # fmt: skip
SIZES = {
    "demonstration": [],
    "large batches": ["client.batch_size=96", "client.max_length=128", "partition=iid", "partition.clients=30"],
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_plan_predicts_the_peak_memory_of_a_run_within_a_quarter(tmp_path: Path, size: str) -> None:
    def fedlora(*arguments: str) -> str:
        code = "import sys; from simulations.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *arguments, *WORK, *SIZES[size]]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    predicted = json.loads(fedlora("plan", "--json"))["run_memory_bytes"]
    fedlora("simulate", "run_dir=run")
    measured = json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]["peak_bytes"]
    assert predicted == pytest.approx(measured, rel=0.25)
