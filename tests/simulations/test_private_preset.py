"""``experiment=private`` is the comparison that its page describes: silos, budgets of numbers and of privacy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from simulations.compose import CONF, compose_config
from simulations.plan import plan_run
from simulations.published.private.public_model import architecture

VALUES = yaml.safe_load((CONF / "experiment" / "private.yaml").read_text())
METHODS = [[f"method={method}"] for method in VALUES["hydra"]["sweeper"]["params"]["method"].split(",")]
FED_SB = ["method=fed_sb", "adapter.basis=weight"]


@pytest.mark.parametrize("method", [*METHODS, FED_SB], ids=lambda method: method[0])
def test_every_method_trains_as_many_numbers_under_the_same_budget(method: list[str], tmp_path: Path) -> None:
    architecture().save_pretrained(tmp_path)
    plan = plan_run(compose_config(["experiment=private", "privacy.epsilon=3", f"backbone.path={tmp_path}", *method]))
    assert plan["trainable_params"] == pytest.approx(8 * 4 * (64 + 64) + 64 * 10 + 10, rel=0.03)
    assert (plan["setup_params"] > 0) == (method == ["method=fedsvd"])  # a new A after every round
    for silo in plan["privacy"]["clients"]:
        rows = silo["rows"]
        assert rows in (1249, 1250)
        assert silo["steps"] == 24
        assert silo["sample_rate"] == pytest.approx(256 / rows)
        assert silo["delta"] == pytest.approx(rows**-1.1)
        assert 2.97 < silo["epsilon"] <= 3
