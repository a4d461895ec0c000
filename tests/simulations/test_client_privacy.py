"""Whole runs with client-level differential privacy: budget, outputs, resume, engines, drop-outs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chi2
from scipy.stats import norm as normal

from fedlora.client import Worker
from fedlora.config import Config
from fedlora.errors import FedloraError, InputError
from fedlora.privacy.client_level import epsilon_of
from fedlora.privacy.statement import SIMULATED
from simulations import tables
from simulations.forget import forget
from simulations.plan import plan_run
from simulations.report import Report
from simulations.sampler import cohort
from simulations.simulate import resume, start
from tests.conftest import Compose
from tests.simulations.test_resume import KillAt, Killed, assert_same_run
from tests.simulations.test_rounds import rounds_of, without_time
from tests.simulations.test_tables import printed

EQUAL = "strategy.weighting=uniform"
PRIVATE = ["privacy=client", "privacy.clip=0.1", "privacy.epsilon=8"]
STRATEGIES = {
    "ffa": ["method=ffa", EQUAL],
    "fed_sb": ["method=fed_sb", EQUAL],
    "fed_sb, a new basis": ["method=fed_sb", EQUAL, "strategy.refresh=2"],
    "fedsvd": ["method=fedsvd", EQUAL],
    **{
        name: ["method=ffa", f"strategy._target_=flwr.serverapp.strategy.{name}"]
        for name in ("FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad")
    },
}
KINDS = {
    "fixed": [],
    "adaptive": ["privacy.clipping=adaptive", "privacy.quantile=0.5"],
    "noise of clients": ["privacy.noise=clients"],
    "secret": ["privacy.secret_cohort=true", "cohort.size=1", "rounds=8", "eval.every=4"],
}


def private(tiny: Compose, strategy: str = "ffa", kind: str = "fixed", *more: str) -> Config:
    return tiny(*STRATEGIES[strategy], *PRIVATE, *KINDS[kind], *more)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "fedlora_state.safetensors")


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [*((name, "fixed") for name in STRATEGIES), *(("FedAdam", kind) for kind in KINDS if kind != "fixed")],
)
def test_a_run_spends_its_budget_and_not_more(tiny: Compose, tmp_path: Path, strategy: str, kind: str) -> None:
    summary = start(private(tiny, strategy, kind), tmp_path / "run")
    spent = [record["epsilon"] for record in rounds_of(tmp_path / "run")]
    assert spent[0] == 0
    assert spent == sorted(spent)
    assert 7.99 < spent[-1] <= 8
    assert spent[-1] == summary["privacy"]["epsilon"]
    assert summary["privacy"]["delta"] < 1 / summary["clients"]["population"]
    assert summary["failures"] == 0


def test_epsilon_grows_with_the_rounds_of_the_client_that_is_drawn_most_often(tiny: Compose, tmp_path: Path) -> None:
    summary = start(private(tiny, "ffa", "fixed", "rounds=6", "cohort.size=2"), tmp_path / "run")
    drawn: dict[str, int] = {}
    for record in rounds_of(tmp_path / "run")[1:]:
        for client in record["cohort"]:
            drawn[client] = drawn.get(client, 0) + 1
        most = max(drawn.values())
        privacy = summary["privacy"]
        assert record["epsilon"] == epsilon_of(privacy["noise_multiplier"], most, privacy["delta"], "rdp")
    assert max(drawn.values()) < 6


def test_the_plan_shows_noise_and_epsilon_of_the_run(tiny: Compose, tmp_path: Path) -> None:
    config = private(tiny)
    plan = plan_run(config)
    assert plan["privacy"] == start(config, tmp_path / "run")["privacy"]
    text = " ".join(printed(tables.plans([plan], 10.0)).split())
    assert SIMULATED in text
    assert f"noise multiplier = {plan['privacy']['noise_multiplier']:.4g} in 3 rounds" in text
    assert "epsilon = 8" in text or "epsilon = 7.99" in text


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("fed_sb, a new basis", "secret"), ("fed_sb, a new basis", "noise of clients"), ("FedAdam", "noise of clients")],
)
def test_the_plan_counts_the_bytes_of_the_run(tiny: Compose, tmp_path: Path, strategy: str, kind: str) -> None:
    config = private(tiny, strategy, kind)
    planned, summary = plan_run(config), start(config, tmp_path / "run")
    for key in ("payload_up", "payload_down", "setup_bytes"):
        assert summary["totals"][key] == planned[key]
    assert summary["totals"]["message_down"] == pytest.approx(planned["message_down"], rel=1e-3)


def test_every_output_says_simulated_not_private(tiny: Compose, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = start(private(tiny), run, merged=True)
    assert summary["privacy"]["simulated"] is True
    assert SIMULATED in summary["label"]
    assert SIMULATED in summary["privacy"]["statement"]
    for record in rounds_of(run):
        assert record["privacy"] == SIMULATED
    for folder in ("adapter", "merged"):
        assert SIMULATED in (run / folder / "PRIVACY.txt").read_text()
    assert SIMULATED in printed(tables.comparison([summary]))
    assert SIMULATED in str(tables.caption([summary]))
    assert SIMULATED in (run / "log.txt").read_text()
    Report.of(run).write(tmp_path / "report.html", [tmp_path / f"table.{ending}" for ending in ("csv", "md", "tex")])
    for name in ("report.html", "table.csv", "table.md", "table.tex"):
        assert SIMULATED in (tmp_path / name).read_text(), name


def test_a_run_without_privacy_says_nothing_of_it(tiny: Compose, tmp_path: Path) -> None:
    summary = start(tiny("method=ffa"), tmp_path / "run")
    assert summary["privacy"] is None
    assert SIMULATED not in summary["label"]
    assert {record["epsilon"] for record in rounds_of(tmp_path / "run")} == {None}
    assert not (tmp_path / "run" / "adapter" / "PRIVACY.txt").exists()


def test_without_noise_nothing_is_promised(tiny: Compose, tmp_path: Path) -> None:
    more = ["privacy.noise_multiplier=0", "privacy.epsilon=null"]
    summary = start(private(tiny, "ffa", "fixed", *more), tmp_path / "run")
    assert summary["privacy"]["epsilon"] is None
    assert "nothing is guaranteed" in summary["privacy"]["statement"]


def test_with_a_wide_clip_and_no_noise_the_run_is_the_one_without_privacy(tiny: Compose, tmp_path: Path) -> None:
    off = ["privacy=client", "privacy.clip=1e6", "privacy.noise_multiplier=0"]
    start(tiny("method=ffa", EQUAL), tmp_path / "usual")
    for noise in ("server", "clients"):
        start(tiny("method=ffa", EQUAL, *off, f"privacy.noise={noise}"), tmp_path / noise)
        for key, expected in state_of(tmp_path / "usual").items():
            torch.testing.assert_close(state_of(tmp_path / noise)[key], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("ffa", "adaptive"), ("FedAdam", "secret"), ("fed_sb, a new basis", "secret"), ("FedAvgM", "noise of clients")],
)
def test_a_killed_run_resumes_to_the_same_bits(tiny: Compose, tmp_path: Path, strategy: str, kind: str) -> None:
    config = private(tiny, strategy, kind)
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(round_end=3)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["privacy"]["epsilon"] <= 8


@pytest.mark.parametrize("kind", ["adaptive", "noise of clients"])
def test_engines_give_the_same_numbers(tiny: Compose, tmp_path: Path, kind: str) -> None:
    for engine in ("loop", "cohort"):
        start(private(tiny, "ffa", kind, f"engine={engine}", "engine.workers=0"), tmp_path / engine)
    for key, expected in state_of(tmp_path / "loop").items():
        torch.testing.assert_close(state_of(tmp_path / "cohort")[key], expected, rtol=0, atol=2e-5)


def test_a_secret_cohort_is_in_no_output(tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Worker.handle

    def failing(self: Worker, message: Any) -> Any:
        client = str(message.content.config_records["config"]["client-id"])
        if client == "site 06":
            raise FedloraError(f"the disk of client '{client}' is full")
        return handle(self, message)

    monkeypatch.setattr(Worker, "handle", failing)
    run = tmp_path / "run"
    config = private(tiny, "fed_sb", "secret", "cohort.size=6", "eval.max_clients=null")
    summary = start(config, run)
    records = rounds_of(run)
    assert summary["failures"] > 0
    assert {record["cohort"] for record in records} == {None}
    assert any(record["failures"] == {"? 1": "the disk of client '?' is full"} for record in records)
    assert set(pd.read_parquet(run / "ledger.parquet")["client"]) == {"?"}
    assert "site 06" not in (run / "log.txt").read_text()
    evaluated = pd.read_parquet(run / "clients.parquet")
    assert len(evaluated[evaluated["kind"] == "seen"]) == summary["clients"]["evaluated"]
    assert summary["clients"]["evaluated"] >= summary["clients"]["population"] - 1


def test_coins_of_a_secret_cohort_are_independent_and_have_the_rate_that_is_accounted_for(tiny: Compose) -> None:
    config, clients = private(tiny, "ffa", "secret", "cohort.size=3"), [f"c{number}" for number in range(9)]
    joins = np.array([[c in cohort(config, clients, r) for c in clients] for r in range(1, 4001)], dtype=float)
    bound = normal.ppf(1 - 1e-6) / np.sqrt(4000)
    assert np.abs(joins.mean(0) - 3 / 9).max() < bound * np.sqrt(3 / 9 * 6 / 9)
    correlation = np.corrcoef(joins.T) - np.eye(9)  # -1 / 8 if the size were fixed
    assert np.abs(correlation).max() < bound


def test_rounds_of_a_secret_cohort_vary_in_size_and_may_be_empty(tiny: Compose, tmp_path: Path) -> None:
    start(private(tiny, "FedAvgM", "secret", "seed=2", "rounds=10", "eval.every=10"), tmp_path / "run")
    ups = pd.read_parquet(tmp_path / "run" / "ledger.parquet").query("direction == 'up'").groupby("round").size()
    counts = [int(ups.get(server_round, 0)) for server_round in range(1, 11)]
    assert min(counts) == 0
    assert max(counts) > 1
    assert [record["loss"] is None for record in rounds_of(tmp_path / "run")][1:] == [count == 0 for count in counts]


def test_a_budget_that_does_not_hold_is_refused_before_a_file_is_made(tiny: Compose, tmp_path: Path) -> None:
    for settings, message in {
        ("privacy.noise_multiplier=0.1",): r"privacy\.noise_multiplier = 0\.1 would spend epsilon = .* in 3 rounds",
        ("privacy.delta=0.2",): r"privacy\.delta = 0\.2 is not below",
        ("privacy.secret_cohort=true", "cohort.size=null"): r"privacy\.secret_cohort=true has nothing to keep secret",
    }.items():
        with pytest.raises(InputError, match=message):
            start(private(tiny, "ffa", "fixed", *settings), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_nobody_is_forgotten_by_using_their_rows_again(tiny: Compose, tmp_path: Path) -> None:
    start(private(tiny), tmp_path / "run")
    with pytest.raises(InputError, match=r"was run with privacy=client, and to forget a client its rows"):
        forget(tmp_path / "run", "site 01")


@pytest.mark.parametrize("failing", [[], ["site 01", "site 03", "site 06"]])
@pytest.mark.parametrize("noise", ["server", "clients"])
def test_the_model_of_a_round_has_the_noise_that_is_accounted_for(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: str, failing: list[str]
) -> None:
    handle = Worker.handle

    def some_fail(self: Worker, message: Any) -> Any:
        if str(message.content.config_records["config"]["client-id"]) in failing:
            raise FedloraError("it is switched off")
        return handle(self, message)

    monkeypatch.setattr(Worker, "handle", some_fail)
    still = ["client.lr=1e-9", "cohort.size=null", "rounds=1", "adapter.target_modules=all-linear"]
    summary = start(private(tiny, "ffa", "fixed", *still, f"privacy.noise={noise}"), tmp_path / "run")
    start(tiny("method=ffa", *still), tmp_path / "start")
    assert summary["failures"] == len(failing)
    one, two = state_of(tmp_path / "run"), state_of(tmp_path / "start")
    found = torch.cat([(one[key] - two[key]).double().flatten() for key in one if "lora_B" in key])
    expected = summary["privacy"]["noise_multiplier"] * 0.1 / summary["clients"]["population"]
    statistic, freedom = float(found.square().sum()) / expected**2, found.numel()
    assert chi2.ppf(1e-6, freedom) < statistic < chi2.ppf(1 - 1e-6, freedom)


def test_another_seed_draws_other_noise(tiny: Compose, tmp_path: Path) -> None:
    for name in ("one", "two"):
        start(private(tiny), tmp_path / name)
    start(private(tiny, "ffa", "fixed", "seed=5"), tmp_path / "other")
    assert without_time(tmp_path / "one") == without_time(tmp_path / "two")
    assert without_time(tmp_path / "one") != without_time(tmp_path / "other")
