from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlora.errors import InputError
from simulations.engines.pool import Pools
from simulations.simulate import resume, start
from simulations.sweep import run_trial
from tests.conftest import Compose
from tests.simulations.test_resume import KillAt, Killed
from tests.simulations.test_rounds import rounds_of

MINE = """
class Tracker:
    said = []

    def __init__(self, run_name, **settings):
        self.said.append(("made", run_name, settings))

    def start(self):
        self.said.append("start")

    def store_init_configuration(self, values):
        self.said.append(("configuration", values))

    def log(self, values, step):
        self.said.append((step, values))

    def finish(self):
        self.said.append("finish")


class Unreachable(Tracker):
    def log(self, values, step):
        raise ConnectionError("no route to host")
"""


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), f"{tag} has a step twice"
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def assert_logged(folder: Path) -> None:
    """What TensorBoard shows is what ``rounds.jsonl`` says."""
    logged, total = scalars(folder), 0
    for record in rounds_of(folder):
        step = record["round"]
        total += record["message_up"] + record["message_down"]
        assert logged["bytes/run"][step] == total
        assert logged["bytes/payload_up"][step] == record["payload_up"]
        assert logged["seconds/train"][step] == pytest.approx(record["seconds"]["train"])
        for name, value in {**record["metrics"]}.items():
            assert logged[f"metrics/{name}"][step] == pytest.approx(value)
        assert (step in logged["loss"]) == (record["loss"] is not None)
        assert (step in logged["aggregation_error"]) == (record["aggregation_error"] is not None)
    assert logged.keys() >= {"clients/worst_decile", "bytes/setup", "failures", "cohort", "best/validation_accuracy"}


def test_tensorboard_has_every_number_of_every_round_without_being_asked(tiny: Compose, tmp_path: Path) -> None:
    start(tiny(), tmp_path / "run")
    assert_logged(tmp_path / "run")


def test_a_resumed_run_shows_each_round_once(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(tiny("checkpoint.every=2"), tmp_path / "run", callbacks=[KillAt(client=11)])
    resume(tmp_path / "run")
    assert_logged(tmp_path / "run")


def test_no_tracker_leaves_no_trace(tiny: Compose, tmp_path: Path) -> None:
    start(tiny("rounds=1", "tracking=none"), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_a_tracker_of_ones_own_is_told_the_configuration_and_every_round(
    tiny: Compose, tmp_path: Path, mine: Path
) -> None:
    from fedlora.plugins import load_object

    own = ["tracking=custom", f"tracking.name={mine}:Tracker", "tracking.settings.colour=red", "rounds=1"]
    start(tiny(*own), tmp_path / "run")
    said = load_object(f"{mine}:Tracker", "tracking.name").said
    assert said[:2] == [("made", "fedlora", {"colour": "red"}), "start"]
    assert said[2][0] == "configuration"
    assert said[2][1]["client.batch_size"] == 4
    assert [entry[0] for entry in said[3:-1]] == [0, 1, 1]
    assert said[-1] == "finish"


def test_a_tracker_that_cannot_be_reached_does_not_end_the_run(
    tiny: Compose, tmp_path: Path, mine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = ["tracking=custom", f"tracking.name={mine}:Unreachable", "rounds=1"]
    with caplog.at_level(logging.WARNING, "fedlora.notices"):
        assert start(tiny(*own), tmp_path / "run")["rounds"] == 1
    said = [record.getMessage() for record in caplog.records if "no route to host" in record.getMessage()]
    assert len(said) == 1
    assert "the run goes on" in said[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbord", "Did you mean 'tensorboard'"), ("aim", "pip install aim"), ("./no.py:Tracker", "no.py")],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(
    tiny: Compose, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        start(tiny("tracking=custom", f"tracking.name={name}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tracker_is_no_reason_to_repeat_a_finished_trial(tiny: Compose, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    for settings, status in ((["tracking=none"], "finished"), ([], "kept")):
        composed = OmegaConf.create(tiny("rounds=1", "method=zero_shot", *settings).model_dump())
        assert run_trial(composed, tmp_path / "0", [], merged=False, pools=Pools())[0].status == status
