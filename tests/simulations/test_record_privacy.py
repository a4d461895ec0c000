"""Promise 4: epsilon is one account of everything that a client released, whatever happened to the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.privacy.accounting import Steps, default_delta, epsilon_of
from simulations.plan import plan_run
from simulations.simulate import resume, start
from tests.conftest import Compose
from tests.simulations.test_cohort import assert_engines_agree, states
from tests.simulations.test_resume import KillAt, Killed, assert_same_run
from tests.simulations.test_rounds import rounds_of

PRIVATE = ["privacy=record", "privacy.clip=0.5", "client.local_epochs=2"]
QUICK, SLOW = ["fed_sb", "fedsvd", "central"], ["fedex", "fedit", "ffa", "ravan", "rolora", "fedsa", "flora", "local"]


@pytest.mark.parametrize("method", [*QUICK, *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW)])
def test_cohort_equals_loop_with_the_same_noise(tiny: Compose, tmp_path: Path, method: str) -> None:
    assert_engines_agree(tiny, tmp_path, *PRIVATE, f"method={method}", "cohort.size=null")


def test_cohort_equals_loop_for_a_language_model(tiny_lm: Compose, tmp_path: Path) -> None:
    assert_engines_agree(tiny_lm, tmp_path, *PRIVATE, "method=fed_sb", "adapter.target_modules=all-linear")


def test_the_penalty_of_o_lora_gets_no_noise_and_no_clipping(tiny: Compose, tmp_path: Path) -> None:
    assert_engines_agree(tiny, tmp_path, *PRIVATE, "method=o_lora", "cohort.size=null")


@pytest.mark.parametrize(
    ("engine", "kill"), [("loop", {"client": 9}), ("cohort", {"client": 9}), ("cohort", {"round_end": 2})], ids=str
)
def test_a_killed_run_resumes_to_the_same_bits_and_the_same_epsilon(
    tiny: Compose, tmp_path: Path, engine: str, kill: dict[str, int]
) -> None:
    config = tiny(*PRIVATE, "method=ffa", f"engine={engine}", "cohort.size=null")
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(**kill)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "whole" / "summary.json").exists()


def test_epsilon_of_every_round_is_one_account_over_the_rounds_so_far(tiny: Compose, tmp_path: Path) -> None:
    config = tiny(*PRIVATE, "method=ffa", "cohort.size=null", "privacy.noise_multiplier=1.2", "privacy.epsilon=null")
    start(config, tmp_path / "run")
    train = Federation(config).index.train
    for record in rounds_of(tmp_path / "run"):
        each = []
        for rows in train.values():
            steps = Steps(1.2, min(1.0, 4 / len(rows)), 2 * -(-len(rows) // 4) * record["round"])
            each.append(epsilon_of([steps], default_delta(len(rows)), "rdp"))
        if record["round"] == 0:
            assert record["epsilon"] is None  # nothing has been released
        else:
            assert record["epsilon"] == pytest.approx(max(each), abs=1e-9)
            assert record["epsilon_median"] == pytest.approx(np.median(each), abs=1e-9)


def test_the_budget_lasts_for_the_rounds_of_the_run(tiny: Compose, tmp_path: Path) -> None:
    start(tiny(*PRIVATE, "method=ffa", "cohort.size=null", "privacy.epsilon=3"), tmp_path / "run")
    last = rounds_of(tmp_path / "run")[-1]
    assert 2.9 < last["epsilon"] <= 3
    assert last["failures"] == {}


def test_clients_without_budget_sit_out_and_the_run_goes_on(tiny: Compose, tmp_path: Path) -> None:
    config = tiny(*PRIVATE, "method=ffa", "cohort.size=null", "privacy.epsilon=3", "privacy.rounds=2", "rounds=4")
    summary = start(config, tmp_path / "run")
    before, last = rounds_of(tmp_path / "run")[2], rounds_of(tmp_path / "run")[-1]
    assert before["failures"] == {}
    assert set(last["failures"]) == set(last["cohort"])
    assert all(reason.startswith("sits out: it has spent epsilon 2.9") for reason in last["failures"].values())
    assert last["epsilon"] == before["epsilon"] <= 3
    assert last["metrics"] == before["metrics"]  # the model is what it was
    assert summary["rounds"] == 4
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    assert all("sits out" in reason for reason in ledger.query("round == 4 and direction == 'up'")["status"])


def test_counts_and_losses_stay_at_the_client_if_asked(tiny: Compose, tmp_path: Path) -> None:
    silent = ["privacy.send_counts=false", "privacy.send_losses=false"]
    config = tiny(*PRIVATE, "method=ffa", *silent)
    plan, summary = plan_run(config), start(config, tmp_path / "silent")
    assert plan["total_bytes"] == summary["totals"]["message_up"] + summary["totals"]["message_down"]
    assert rounds_of(tmp_path / "silent")[-1]["loss"] is None
    start(tiny(*PRIVATE, "method=ffa", "strategy.weighting=uniform"), tmp_path / "uniform")
    one, two = states(tmp_path / "silent"), states(tmp_path / "uniform")
    assert all(one[key].equal(two[key]) for key in one)
    with pytest.raises(InputError, match=r"privacy\.send_losses is a setting of privacy=record"):
        tiny("+privacy.send_losses=false")


def test_every_output_says_that_nothing_was_private(tiny: Compose, tmp_path: Path) -> None:
    config = tiny(*PRIVATE, "method=ffa", "privacy.epsilon=5", "cohort.size=null")
    plan, summary = plan_run(config), start(config, tmp_path / "run")
    assert plan["privacy"]["epsilon"] == pytest.approx(5, abs=0.05)
    assert summary["privacy"]["epsilon"] == pytest.approx(5, abs=0.05)
    fewest, most = plan["privacy"]["clients"]
    assert fewest["rows"] < most["rows"]
    assert fewest["noise_multiplier"] > most["noise_multiplier"]  # whose rows are drawn less often
    assert summary["privacy"]["simulated"]
    for text in (summary["privacy"]["statement"], summary["label"], rounds_of(tmp_path / "run")[1]["privacy"]):
        assert "simulated, not private" in text


def test_without_noise_there_is_no_epsilon(tiny: Compose, tmp_path: Path) -> None:
    summary = start(tiny(*PRIVATE, "privacy.epsilon=null", "privacy.noise_multiplier=0"), tmp_path / "run")
    assert summary["privacy"]["epsilon"] is None
    assert "No noise was added" in summary["privacy"]["statement"]
    assert rounds_of(tmp_path / "run")[-1]["epsilon"] is None


@pytest.mark.parametrize("method", ["ffa", "fed_sb", "fedex"])
def test_plan_equals_ledger(tiny: Compose, tmp_path: Path, method: str) -> None:
    config = tiny(*PRIVATE, f"method={method}")
    plan, summary = plan_run(config), start(config, tmp_path / "run")
    assert plan["total_bytes"] == summary["totals"]["message_up"] + summary["totals"]["message_down"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["privacy.delta=0.2"],
            r"privacy\.delta = 0\.2 is not below 1/\d+, and client 'site \d+' has \d+ training rows",
        ),
        (["privacy.epsilon=null"], r"set privacy\.epsilon .* or privacy\.noise_multiplier"),
        (["privacy.clip=null"], r"privacy\.clip is missing"),
        (["method=flora", "adapter.client_ranks=[4,2]"], r"Use adapter\.client_ranks=null"),
        (["method=personal_lora"], r"what it keeps without noise would show"),
        (["method=pfedlora"], r"adapter=pfedlora trains in parts"),
        (["method=fed_sb", "adapter.basis=client_gradient"], r"use adapter\.basis=gradient"),
        (["adapter=dora"], r"privacy=record cannot train adapter=peft\[Lora,use_dora\] here: Opacus has no gradients"),
        (
            ["backbone.gradient_checkpointing=true"],
            r"privacy=record cannot train adapter=lora here: Opacus gives other",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_protected_is_refused_before_there_is_a_folder(
    tiny: Compose, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        start(tiny("privacy=record", *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
