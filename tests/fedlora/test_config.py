from __future__ import annotations

import copy
from typing import Any

import pytest
from pydantic import ValidationError

from fedlora.config import Config, load_config, nearest
from fedlora.errors import InputError


@pytest.fixture
def values(tiny) -> dict[str, Any]:
    return copy.deepcopy(tiny().model_dump())


def put(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *groups, last = key.split(".")
    node = values
    for group in groups:
        node = node[group]
    node[last] = value
    return values


def test_a_configuration_survives_its_own_plain_values(values):
    config = load_config(values)
    assert config.model_dump() == values
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("sed", "seed"),
        ("client.batch_sze", "batch_size"),
        ("client.local_epoch", "local_epochs"),
        ("data.split.public_row", "public_rows"),
        ("wire.dtyp", "dtype"),
    ],
)
def test_a_typo_names_the_nearest_setting(values, typo: str, meant: str):
    with pytest.raises(
        InputError, match=rf"Unknown setting '{typo}'\. Did you mean '{meant}'\? Valid keys here: .*{meant}"
    ):
        load_config(put(values, typo, 1))


def test_a_setting_like_no_other_still_lists_the_valid_ones(values):
    with pytest.raises(InputError) as caught:
        load_config(put(values, "cohort.zzzzzz", 1))
    assert "Did you mean" not in str(caught.value)
    assert "size" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("rounds", "many"), ("rounds", -1), ("rounds", 1.5), ("seed", -1), ("client.lr", 0), ("client.lr", "fast"),
        ("client.lr", float("nan")), ("client.lr", float("inf")), ("client.batch_size", 0),
        ("client.optimizer", "adam"),
        ("client.max_length", 3), ("client", 7), ("cohort.size", 0), ("data.split.test", 1.0),
        ("data.split.test", -0.1),
        ("partition.alpha", 0), ("wire.dtype", "fp8"), ("engine.name", "spark"),
        ("engine.threads", 0), ("eval.every", 0), ("privacy.name", "dp"), ("backbone.name", "bert"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_or_range_is_named_with_its_setting(values, key: str, wrong: Any):
    with pytest.raises(InputError, match=rf"Setting '{key}' = "):
        load_config(put(values, key, wrong))


def test_fractions_that_leave_no_training_rows_are_refused(values):
    put(values, "data.split.validation", 0.5)
    with pytest.raises(InputError, match=r"data\.split.*rows are left to train on"):
        load_config(put(values, "data.split.test", 0.5))


def test_a_missing_setting_is_named(values):
    del values["client"]["lr"]
    with pytest.raises(InputError, match=r"Setting 'client\.lr' is missing"):
        load_config(values)


def test_all_problems_are_named_at_once(values):
    put(values, "seed", -1)
    with pytest.raises(InputError) as caught:
        load_config(put(values, "client.lrr", 1))
    assert "'seed'" in str(caught.value)
    assert "'client.lrr'" in str(caught.value)


def test_a_configuration_cannot_be_changed(values):
    with pytest.raises(ValidationError):
        load_config(values).client.lr = 1.0


def test_bad_input_exits_with_status_two():
    assert InputError("").exit_code == 2


def test_nearest_is_silent_when_nothing_is_near():
    assert nearest("rnk", ["rank", "alpha"]) == " Did you mean 'rank'?"
    assert nearest("xyz", ["rank", "alpha"]) == ""
