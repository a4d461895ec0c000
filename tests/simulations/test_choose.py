"""What the configuration leaves open about the engine is chosen once, said, and written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from fedlora.client import Worker
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.precision import multiplies_bf16
from fedlora.store import ClientStore
from simulations.compose import compose_config
from simulations.engines.choose import settle
from simulations.engines.rows_per_step import ON_CPU
from simulations.simulate import start
from tests.conftest import Compose


def settled(config: Config, folder: Path) -> tuple[Config, str]:
    worker = Worker(Federation(config), ClientStore(folder))
    said = settle(worker)
    return worker.federation.config, " ".join(said)


@pytest.mark.parametrize(
    ("overrides", "engine", "reason"),
    [
        ([], "cohort", "engine=auto: cohort, in this process"),
        (["adapter.dropout=0.1"], "loop", "adapter dropout is drawn for each client"),
        (["cohort.size=1"], "loop", "engine=auto: loop"),
    ],
    ids=str,
)
def test_auto_chooses_and_says_why(
    tiny: Compose, tmp_path: Path, overrides: list[str], engine: str, reason: str
) -> None:
    start(tiny("engine=auto", "rounds=1", *overrides), tmp_path / "run")
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["engine"]["name"] == engine
    assert reason in (tmp_path / "run" / "log.txt").read_text()
    assert (written["engine"]["tokens"] in ON_CPU) == (engine == "cohort")


def test_what_is_settled_is_not_chosen_again(tiny: Compose, tmp_path: Path) -> None:
    first, said = settled(tiny("engine=auto", "precision=auto"), tmp_path / "a")
    again, unsaid = settled(first, tmp_path / "b")
    assert again == first
    assert said
    assert not unsaid
    assert first.precision == ("bf16" if multiplies_bf16() else "fp32")


def test_a_measurement_is_remembered_on_the_machine(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    first, _ = settled(tiny("engine=cohort"), tmp_path / "a")
    (kept,) = (tmp_path / "cache" / "tokens").iterdir()
    assert int(kept.read_text()) == first.engine.tokens
    kept.write_text("77")
    assert settled(tiny("engine=cohort"), tmp_path / "b")[0].engine.tokens == 77
    assert settled(tiny("engine=cohort", "client.batch_size=2"), tmp_path / "c")[0].engine.tokens != 77


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=cohort", "engine.address=auto"], r"engine\.address = 'auto' needs engine\.workers"),
        (["engine=flower", "engine.workers=0"], r"set engine\.workers to 1 or more"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    tiny: Compose, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        start(tiny(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["precision=fp16", "engine.tokens=0", "engine.workers=-1"])
def test_values_out_of_range_name_their_setting(wrong: str) -> None:
    with pytest.raises(InputError, match=wrong.split("=")[0]):
        compose_config(["engine=cohort", wrong])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs their number decides")
def test_workers_are_chosen_for_rounds_that_can_feed_them(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    few, _ = settled(tiny("engine=auto"), tmp_path / "few")
    many, said = settled(tiny("engine=auto", "engine.tokens=30", "cohort.size=null"), tmp_path / "many")
    assert few.engine.workers == 0
    assert many.engine.workers == 4
    assert "on 4 Ray actors" in said
