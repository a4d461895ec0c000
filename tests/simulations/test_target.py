from __future__ import annotations

from pathlib import Path
from typing import Any

from simulations.simulate import start
from simulations.target import cost_of_target
from tests.conftest import Compose


def record(number: int, value: float | None) -> dict[str, Any]:
    metrics = {} if value is None else {"validation_accuracy": value}
    return {
        "round": number, "metrics": metrics, "message_up": 10, "message_down": 100 * number,
        "seconds": {"train": 1.0, "other": 0.5},
    }  # fmt: skip


ROUNDS = [record(0, 0.2), record(1, None), record(2, 0.6), record(3, 0.9), record(4, 0.5)]


def test_a_target_costs_everything_up_to_the_first_round_that_reached_it() -> None:
    found = cost_of_target(ROUNDS, "accuracy", 0.6)
    assert found == {"metric": "validation_accuracy", "value": 0.6, "round": 2, "bytes": 330, "seconds": 4.5}


def test_a_target_that_was_never_reached_has_no_cost() -> None:
    found = cost_of_target(ROUNDS, "accuracy", 0.95)
    assert (found["round"], found["bytes"], found["seconds"]) == (None, None, None)


def test_without_validation_rows_clients_own_test_rows_reach_the_target(digits: Compose, tmp_path: Path) -> None:
    config = digits("local_full", "data.split.validation=0", "eval.target=0.0")
    assert start(config, tmp_path)["target"].items() >= {"metric": "seen_accuracy", "round": 0, "bytes": 0}.items()


def test_a_run_says_what_its_target_cost(tiny: Compose, tmp_path: Path) -> None:
    reached = start(tiny("eval.target=0.0"), tmp_path / "reached")["target"]
    assert (reached["round"], reached["bytes"]) == (0, 0)
    missed = start(tiny("eval.target=1.1"), tmp_path / "missed")["target"]
    assert missed["round"] is None
    assert start(tiny("rounds=1"), tmp_path / "none")["target"] is None
