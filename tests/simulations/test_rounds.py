"""Whole runs on a tiny model: every method, the ledger against the plan, failures, determinism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file

from fedlora.errors import InputError
from simulations.compose import choices_of, options
from simulations.plan import plan_run
from simulations.simulate import start
from tests.conftest import Compose

METHODS = [m for m in options("method") if "backbone" not in choices_of(m)]  # the others: see test_personal
FEDERATED = [method for method in METHODS if method not in ("central", "local", "zero_shot")]
APPROXIMATE, PERSONAL = ("fedit", "flexlora", "la_lora", "lora_ga", "o_lora"), ("fedsa",)
COUNTS = ("payload_up", "payload_down", "message_up", "message_down", "setup_bytes")


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def without_time(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in rounds_of(folder)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_complete_run_folder(tiny: Compose, tmp_path: Path, method: str) -> None:
    summary = start(tiny(f"method={method}"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    records = rounds_of(tmp_path / "run")
    assert [record["round"] for record in records] == list(range(summary["rounds"] + 1))
    assert summary["best"]["metrics"]["validation_accuracy"] == max(
        r["metrics"]["validation_accuracy"] for r in records if r["metrics"]
    )
    for record in records:
        assert set(record) >= {
            "round", "loss", "metrics", "clients", *COUNTS, "aggregation_error", "cohort", "failures", "seconds",
            "epsilon",
        }  # fmt: skip
        assert set(record["seconds"]) == {"select", "train", "aggregate", "evaluate", "other"}
        assert record["aggregation_error"] is not None or record["aggregation_error_reason"]
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    assert len(ledger) == (2 * 4 * 3 if method in FEDERATED else 0)
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_language_model(tiny_lm: Compose, tmp_path: Path, method: str) -> None:
    summary = start(tiny_lm(f"method={method}"), tmp_path / "run")
    records = rounds_of(tmp_path / "run")
    if summary["rounds"]:
        first, last = records[0], records[-1]
        assert last["metrics"]["validation_loss"] < first["metrics"]["validation_loss"]
        assert last["metrics"]["validation_perplexity"] > 1.0


@pytest.mark.parametrize("method", FEDERATED)
def test_federated_methods_learn_what_one_word_says(tiny: Compose, tmp_path: Path, method: str) -> None:
    learn = ["rounds=5", "eval.every=5", "cohort.size=null", "client.local_epochs=2", "client.lr=2e-2"]
    start(tiny(f"method={method}", *learn), tmp_path / "run")
    losses = [record["loss"] for record in rounds_of(tmp_path / "run")[1:]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"method={method}"] for method in METHODS),
        ["method=fed_sb", "adapter.basis=weight"],
        ["method=fed_sb", "adapter.basis=seeded", "wire.dtype=bf16"],
        ["method=fedit", "adapter.head=private"],
        ["method=fedex", "adapter.head=frozen", "rounds=6", "cohort.size=2"],
        ["method=fedex", "adapter.rank=1", "rounds=8", "cohort.size=2", "wire.dtype=fp16"],
        ["method=ffa", "cohort.size=null"],
        ["method=flora", "adapter.client_ranks=[4,2,1]", "cohort.size=2", "rounds=6"],
        ["method=flora", "adapter.head=private", "wire.dtype=bf16"],
        ["method=flexlora", "adapter.client_ranks=[4,2,1]"],
        ["method=fed_sb", "adapter.basis=client_gradient", "wire.dtype=bf16"],
        ["method=fed_sb", "strategy.refresh=2", "cohort.size=2", "rounds=5"],
        ["method=fed_sb", "adapter.basis=weight", "strategy.refresh=1", "wire.dtype=bf16"],
        ["method=fed_sb", "adapter.basis=seeded", "strategy.refresh=2", "cohort.size=null", "rounds=4"],
        ["method=fedsvd", "strategy.refresh=2", "cohort.size=2", "rounds=5"],
        ["strategy._target_=flwr.serverapp.strategy.FedAvg"],
    ],
    ids=" ".join,
)
def test_plan_equals_ledger_when_nobody_fails(tiny: Compose, tmp_path: Path, overrides: list[str]) -> None:
    config = tiny(*overrides)
    planned = plan_run(config)
    summary = start(config, tmp_path / "run")
    assert {key: summary["totals"][key] for key in ("payload_up", "payload_down", "setup_bytes")} == {
        key: planned[key] for key in ("payload_up", "payload_down", "setup_bytes")
    }
    for expected, record in zip(planned["per_round"], rounds_of(tmp_path / "run")[1:], strict=True):
        for key in ("payload_up", "payload_down", "setup_bytes"):
            assert record[key] == expected[key], (record["round"], key)
        for key in ("message_up", "message_down", "transport_up", "transport_down"):
            assert record[key] == pytest.approx(expected[key], rel=1e-3), (record["round"], key)


@pytest.mark.parametrize("method", FEDERATED)
def test_measured_aggregation_error_keeps_the_promise_of_the_method(tiny: Compose, tmp_path: Path, method: str) -> None:
    summary = start(tiny(f"method={method}", "client.lr=1e-2"), tmp_path / "run")
    if method in PERSONAL:
        assert summary["aggregation_error"] is None
    elif method in APPROXIMATE:
        assert summary["aggregation_error"]["max"] > 1e-4
    else:
        assert summary["aggregation_error"]["max"] <= 1e-6


@pytest.mark.parametrize("method", ["fedex", "fed_sb", "local"])
def test_same_seed_gives_the_same_bits(tiny: Compose, tmp_path: Path, method: str) -> None:
    for name in ("one", "two"):
        start(tiny(f"method={method}"), tmp_path / name)
    assert without_time(tmp_path / "one") == without_time(tmp_path / "two")
    if method != "local":
        one, two = (load_file(tmp_path / name / "adapter" / "fedlora_state.safetensors") for name in ("one", "two"))
        assert all(one[key].equal(two[key]) for key in one)


def test_another_seed_gives_another_result(tiny: Compose, tmp_path: Path) -> None:
    for seed in (1, 2):
        start(tiny(f"seed={seed}"), tmp_path / str(seed))
    assert without_time(tmp_path / "1") != without_time(tmp_path / "2")


def test_methods_of_one_seed_share_cohorts_and_evaluation_rows(tiny: Compose, tmp_path: Path) -> None:
    cohorts = []
    for method in ("fedit", "fed_sb", "local"):
        start(tiny(f"method={method}"), tmp_path / method)
        cohorts.append([record["cohort"] for record in rounds_of(tmp_path / method)])
    assert cohorts[0] == cohorts[1] == cohorts[2]


def test_a_private_head_stays_at_the_client(tiny: Compose, tmp_path: Path) -> None:
    shared = start(tiny("method=ffa"), tmp_path / "shared")
    private = start(tiny("method=ffa", "adapter.head=private"), tmp_path / "private")
    head = 2 * 32 + 2
    assert shared["totals"]["payload_up"] - private["totals"]["payload_up"] == 4 * head * 4 * 3
    states = sorted((tmp_path / "private" / "clients").glob("site*/round_*.safetensors"))
    assert states
    assert set(load_file(states[0])) == {"classifier.weight", "classifier.bias"}
    assert "test_accuracy" not in private["final"]["metrics"]


def test_a_run_that_diverges_is_bad_input_and_never_looks_finished(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every client failed.*Lower client\.lr"):
        start(tiny("client.lr=1e30", "client.local_epochs=3"), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_second_run_never_overwrites_the_first(tiny: Compose, tmp_path: Path) -> None:
    start(tiny("method=zero_shot"), tmp_path / "run")
    with pytest.raises(InputError, match="already holds a finished run"):
        start(tiny("method=zero_shot"), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cohort.size=100", r"cohort\.size = 100, but there are only"),
        ("adapter.rank=64", r"adapter\.rank = 64 is larger than layer"),
        ("adapter.target_modules=[qery]", r"adapter\.target_modules = \['qery'\] matches no layer"),
        ("data.label=lable", r"data\.label"),
        ("data.path=missing.csv", r"data\.path"),
    ],
)
def test_bad_input_is_refused_before_a_file_is_made(tiny: Compose, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        start(tiny(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_class_only_is_refused(tiny: Compose, tmp_path: Path, reviews: Path) -> None:
    rows = pd.read_csv(reviews).assign(label="good")
    rows.to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(InputError, match="one class only"):
        start(tiny(f"data.path={tmp_path / 'one.csv'}"), tmp_path / "run")


def test_a_client_with_one_class_is_normal(tiny: Compose, tmp_path: Path, reviews: Path) -> None:
    rows = pd.read_csv(reviews)
    rows.loc[rows.site == "site 03", "label"] = "good"
    rows.to_csv(tmp_path / "skewed.csv", index=False)
    start(tiny(f"data.path={tmp_path / 'skewed.csv'}", "cohort.size=null", "rounds=1"), tmp_path / "run")


@pytest.mark.parametrize(
    "settings",
    [
        ["FedAvg"], ["FedAdam", "strategy.eta=1e-2"], ["FedAvgM"], ["FedMedian"], ["FedTrimmedAvg"],
        ["Krum", "strategy.num_malicious_nodes=1"],
    ],
    ids=lambda settings: settings[0],
)  # fmt: skip
def test_flower_strategies_run_by_import_path(tiny: Compose, tmp_path: Path, settings: list[str]) -> None:
    name, *more = settings
    summary = start(tiny(f"strategy._target_=flwr.serverapp.strategy.{name}", *more), tmp_path / "run")
    assert summary["failures"] == 0
    assert summary["totals"]["payload_up"] > 0


def test_flower_fedavg_equals_our_average(tiny: Compose, tmp_path: Path) -> None:
    start(tiny("method=ffa"), tmp_path / "ours")
    start(tiny("method=ffa", "strategy._target_=flwr.serverapp.strategy.FedAvg"), tmp_path / "flower")
    ours, flower = (load_file(tmp_path / n / "adapter" / "fedlora_state.safetensors") for n in ("ours", "flower"))
    for key, value in ours.items():
        assert value.sub(flower[key]).abs().max() <= 1e-5


def test_partial_file_plugin_runs(tiny: Compose, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from strategies import FederatedStrategy, weighted_mean\n\n\n"
        "class Mine(FederatedStrategy):\n"
        "    def __init__(self, momentum=0.0):\n"
        "        super().__init__()\n"
        "        self.momentum = momentum\n\n"
        "    def fold(self, server_round, state, replies):\n"
        "        mean = weighted_mean(replies)\n"
        "        return {key: self.momentum * state[key] + (1 - self.momentum) * mean[key] for key in mean}\n"
    )
    summary = start(tiny(f"strategy._target_={tmp_path}/mine.py:Mine", "strategy.momentum=0.5"), tmp_path / "run")
    assert summary["label"] == "Mine(lora)"
    with pytest.raises(InputError, match=r"Unknown setting 'strategy\.momentm' for Mine\. Did you mean 'momentum'"):
        start(tiny(f"strategy._target_={tmp_path}/mine.py:Mine", "strategy.momentm=0.5"), tmp_path / "other")


def test_a_run_is_named_after_what_ran(tiny: Compose, tmp_path: Path) -> None:
    miss = ["adapter=peft", "adapter.config._target_=peft.MissConfig", "adapter.config.r=4", "rounds=1"]
    assert start(tiny(*miss, "strategy=average"), tmp_path / "average")["label"] == "Average(peft[Miss])"
    assert start(tiny("method=ffa", "rounds=1"), tmp_path / "ffa")["label"] == "ffa"
    assert start(tiny("method=ffa", "strategy=fedit", "rounds=1"), tmp_path / "fedit")["label"] == "FedIT(ffa)"


def test_rows_that_cannot_be_used_leave_no_folder(tiny_lm: Compose, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user"}], "site": "a"}\n' * 12)
    chat = [f"data.path={tmp_path / 'chat.jsonl'}", "data.messages=messages", "data.client=null", "partition=iid"]
    with pytest.raises(InputError, match="Row 1"):
        start(tiny_lm(*chat, "partition.clients=4", "cohort.size=1", "data.split.public_rows=0"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_moments_that_would_be_dropped_are_refused(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"client\.keep_optimizer=true has no effect with FLoRA"):
        start(tiny("method=flora", "client.keep_optimizer=true"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
