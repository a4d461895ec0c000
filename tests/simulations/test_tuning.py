from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from simulations.cli import main
from simulations.trials import Trial, TrialLog
from simulations.tuning import choose

SWEPT = frozenset({"method", "client.lr", "seed"})


def trial(method: str, lr: str, seed: int) -> Trial:
    return Trial([f"method={method}", f"client.lr={lr}", "rounds=3", f"seed={seed}"], "", "", "finished")


def test_each_method_chooses_the_value_with_the_best_mean_over_the_tuning_seeds() -> None:
    results = [
        (trial("a", lr, seed), value)
        for lr, values in {"1e-2": (0.9, 0.1), "3e-3": (0.6, 0.6), "1e-3": (0.2, 0.7)}.items()
        for seed, value in enumerate(values)
    ]
    results += [(trial("b", lr, 1), value) for lr, value in {"1e-2": 0.3, "3e-3": 0.2, "1e-3": 0.1}.items()]
    one, two = choose(results, "client.lr", SWEPT)
    assert (one.given, one.value, one.at_the_edge) == (("method=a",), "3e-3", False)
    assert list(one.curve) == ["1e-3", "3e-3", "1e-2"]
    assert list(one.curve.values()) == pytest.approx([0.45, 0.6, 0.5])
    assert (two.value, two.at_the_edge) == ("1e-2", True)


def test_a_value_that_failed_is_not_chosen_and_a_method_that_always_failed_is_left_out() -> None:
    results = [(trial("a", "1", 1), math.nan), (trial("a", "2", 1), 0.1), (trial("b", "1", 1), math.nan)]
    assert [(each.given, each.value) for each in choose(results, "client.lr", SWEPT)] == [(("method=a",), "2")]


def test_a_tuned_sweep_runs_the_chosen_value_with_all_seeds_and_keeps_what_it_has(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["simulate", "-m", *tiny_overrides, "adapter.rank=4", "rounds=1", "run_dir=sweep", "tracking=none"]
    swept = ["method=local,ffa,fedit", "client.lr=1e-4,1e-2", "seed=1,2"]
    assert main([*command, *swept, "+tuning.setting=client.lr", "+tuning.seeds=[1,2,3]"]) == 0
    shown = capfd.readouterr()
    assert "note: " not in shown.err
    document = json.loads((tmp_path / "sweep" / "comparison.json").read_text())
    methods = {method["label"]: method for method in document["methods"]}
    assert list(methods) == ["local", "ffa", "fedit"]
    done = [t for t in TrialLog(tmp_path / "sweep").read() if t.status != "started"]
    assert sum(t.status == "finished" for t in done) == 3 * (2 * 2 + 1)
    assert sum(t.status == "kept" for t in done) == 3 * 2
    for name, method in methods.items():
        assert method["seeds"] == [1, 2, 3]
        finals = [json.loads((tmp_path / "sweep" / f / "summary.json").read_text()) for f in method["folders"]]
        assert [(s["label"], s["seed"]) for s in finals] == [(name, seed) for seed in (1, 2, 3)]
        assert [s["final"]["metrics"]["validation_accuracy"] for s in finals] == method["valid"]
        assert method["value"] in ("0.0001", "0.01")
        assert method["value"] == max(method["curve"], key=method["curve"].get)
        own = [t for t in done if {f"method={name}", f"client.lr={method['value']}"} <= set(t.overrides)]
        folders = {t.folder for t in own}
        found = [json.loads((tmp_path / "sweep" / f / "summary.json").read_text()) for f in folders]
        by_seed = {s["seed"]: s["final"]["metrics"] for s in found}
        assert method["valid"] == [by_seed[seed]["validation_accuracy"] for seed in (1, 2, 3)]
        assert method["test"] == [by_seed[seed].get("test_accuracy") for seed in (1, 2, 3)]
    assert methods["local"]["test"] == [None] * 3
    assert document["reference"] == "ffa"
    assert [row["method"] for row in document["paired"]] == ["fedit"]
    assert "3 seeds" in shown.out
    assert "Holm" in shown.out
