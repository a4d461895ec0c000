"""Every shipped configuration composes, is typed, and says how to run it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fedlora.adapters import build_adapter
from fedlora.errors import InputError
from fedlora.plugins import load_object
from simulations.compose import CONF, compose_config, own_pair

FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))
REQUIRED = {
    "adapter/peft.yaml": ["adapter.config._target_=peft.MissConfig"],
    "tracking/custom.yaml": ["tracking.name=wandb"],
    "privacy/client.yaml": ["privacy.clip=0.5", "privacy.epsilon=8"],
    "task/custom.yaml": ["task.name=./mine.py:Mine"],
    "strategy/custom.yaml": ["strategy._target_=flwr.serverapp.strategy.FedAvg"],
}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_option_composes(path: Path) -> None:
    group, name = path.parent.name, path.stem
    config = compose_config([f"{group}={name}", *REQUIRED.get(str(path), [])])
    build_adapter(config.adapter)
    assert load_object(config.strategy["_target_"], "strategy._target_")


@pytest.mark.parametrize("path", [Path("config.yaml"), *FILES], ids=str)
def test_the_first_comment_is_a_command_that_composes(path: Path) -> None:
    comments = [
        line[2:] for line in (CONF / path).read_text().splitlines() if line.startswith("# ") and "@" not in line
    ]
    program, command, *overrides = shlex.split(comments[0])
    assert (program, command) == ("fedlora", "simulate")
    compose_config(overrides)
    if path.parent.name:
        assert f"{path.parent.name}={path.stem}" in overrides


def test_a_method_sets_adapter_strategy_and_learning_rate_and_each_can_be_overridden() -> None:
    fed_sb, fedit = compose_config(["method=fed_sb"]), compose_config(["method=fedit"])
    assert (fed_sb.adapter["name"], fed_sb.strategy["_target_"]) == ("fed_sb", "strategies.FedSB")
    assert fed_sb.client.lr != fedit.client.lr
    changed = compose_config(["method=fed_sb", "client.lr=0.5", "adapter=ffa", "strategy.weighting=uniform"])
    assert (changed.client.lr, changed.adapter["name"], changed.strategy["weighting"]) == (0.5, "ffa", "uniform")


def test_an_experiment_can_set_a_value_for_each_method() -> None:
    ranks = {m: compose_config(["experiment=matched_budget", f"method={m}"]).adapter["rank"] for m in ("fedit", "ffa")}
    assert ranks == {"fedit": 8, "ffa": 16}
    assert compose_config(["experiment=matched_budget", "method=ffa", "adapter.rank=3"]).adapter["rank"] == 3
    with pytest.raises(InputError, match=r"\(adapter\.rank\): the experiment has a value for fedit, .* none for flora"):
        compose_config(["experiment=matched_budget", "method=flora"])


def test_alpha_of_fed_sb_follows_its_rank() -> None:
    assert compose_config(["method=fed_sb", "adapter.rank=8"]).adapter["alpha"] == 8


@pytest.mark.parametrize(
    "template",
    [
        "{{ question }} Options: {{ options }}",
        'it\'s {{ a }}, "b" \\ c',
        "{% if a %}{{ a }}{% endif %}\\",
        "{{ a['b'] }}",
    ],
)
def test_a_template_needs_no_quotes_of_hydra(template: str) -> None:
    assert compose_config([f"data.text={template}"]).data.text == template


def test_a_setting_of_another_option_is_not_suggested_to_itself() -> None:
    with pytest.raises(InputError, match=r"'backbone\.quantization' does not belong to the option of backbone"):
        compose_config(["backbone=random", "backbone.quantization=int8"])


def test_every_method_has_a_pair_of_its_own() -> None:
    assert own_pair("fed_sb") == ("fed_sb", "strategies.FedSB")
    assert own_pair("fedit") == ("lora", "strategies.FedIT")
