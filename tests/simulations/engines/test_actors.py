"""Ray actors: the same bits as without them, one place for each, and what dies is started anew."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from fedlora.client import Worker
from fedlora.federation import Federation
from fedlora.store import ClientStore
from simulations.callbacks import Callback
from simulations.engines.actors import RayExecutor
from simulations.engines.pool import ActorPool, Pools
from simulations.sampler import cohort
from simulations.simulate import resume, start
from tests.conftest import Compose
from tests.simulations.engines import helpers
from tests.simulations.test_resume import KillAt, Killed, assert_same_run
from tests.simulations.test_rounds import rounds_of

pytestmark = [
    pytest.mark.usefixtures("ray_of_four"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]  # Ray leaves files open
CASES = {
    "fedit": ["method=fedit"],
    "fed_sb: setup": ["method=fed_sb", "adapter.basis=gradient"],
    "flora: restarts": ["method=flora"],
    "local: personal state": ["method=local"],
    "noise": ["method=ffa", "privacy=record", "cohort.size=null"],
    "base correction and moments": ["method=fedex", "client.keep_optimizer=true", "cohort.size=null"],
}
COHORT = ["engine=cohort", "engine.tokens=150", "engine.threads=1"]


QUICK = {("cohort", "local: personal state"), ("cohort", "base correction and moments"), ("loop", "fed_sb: setup")}
"""The others start as many processes again, and find what these find."""


@pytest.mark.parametrize(
    ("engine", "case"),
    [
        pytest.param(engine, case, marks=[] if (engine, case) in QUICK else pytest.mark.slow)
        for engine in ("cohort", "loop")
        for case in CASES
    ],
)
def test_any_number_of_workers_gives_the_same_bits(tiny: Compose, tmp_path: Path, engine: str, case: str) -> None:
    settings = [*CASES[case], *(COHORT if engine == "cohort" else ["engine=loop"]), "rounds=2"]
    start(tiny(*settings, "engine.workers=0"), tmp_path / "0")
    for workers in (1, 2) if (engine, case) == ("cohort", "base correction and moments") else (2,):
        start(tiny(*settings, f"engine.workers={workers}"), tmp_path / str(workers))
        assert_same_run(tmp_path / "0", tmp_path / str(workers))


def actors_of(folder: Path) -> list[int]:
    return list(map(int, re.findall(r"'pid': (\d+)", (folder / "log.txt").read_text())))


def test_runs_that_share_actors_have_the_bits_of_runs_that_do_not(tiny: Compose, tmp_path: Path) -> None:
    runs = {"a": ["method=fedex"], "b": ["method=fed_sb", "seed=2"], "c": ["method=fedit", "engine.tokens=60"]}
    pools = Pools()
    try:
        for name, settings in runs.items():
            config = tiny(*COHORT, *settings, "engine.workers=2", "rounds=2")
            start(config, tmp_path / name, pools=pools)
    finally:
        pools.close()
    assert actors_of(tmp_path / "a") == actors_of(tmp_path / "b") == actors_of(tmp_path / "c")
    assert not psutil.wait_procs([psutil.Process(p) for p in actors_of(tmp_path / "a") if psutil.pid_exists(p)], 30)[1]
    for name, settings in runs.items():
        start(tiny(*COHORT, *settings, "engine.workers=0", "rounds=2"), tmp_path / f"{name} alone")
        assert_same_run(tmp_path / name, tmp_path / f"{name} alone")


def test_what_two_runs_have_in_common_lies_in_the_object_store_once(tiny: Compose, tmp_path: Path) -> None:
    trainers = [
        Worker(Federation(tiny(f"method={method}")), ClientStore(tmp_path)).trainer for method in ("fedit", "fed_sb")
    ]
    pool = ActorPool(tiny("engine.workers=1").engine)
    try:
        pool.hold(trainers[0])
        first = dict(pool._objects)
        pool.hold(trainers[1])
        embeddings = trainers[0].model.module.bert.embeddings.word_embeddings.weight  # pyright: ignore
        place = (embeddings.data_ptr(), embeddings.nbytes)
        assert first[place][1] == pool._objects[place][1]
        assert first.keys() == pool._objects.keys()
    finally:
        pool.close()


def placed(tiny: Compose, folder: Path, workers: int) -> list[dict[str, Any]]:
    worker = Worker(Federation(tiny(f"engine.workers={workers}")), ClientStore(folder))
    pool = ActorPool(worker.federation.config.engine)
    try:
        return RayExecutor(worker.trainer, pool).describe()
    finally:
        pool.close()


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_worker_is_a_process_with_its_share_of_the_gpus(tiny: Compose, tmp_path: Path, workers: int) -> None:
    places = placed(tiny, tmp_path, workers)
    assert len({place["pid"] for place in places}) == workers
    assert Counter(gpu for place in places for gpu in place["gpus"]) == {"0": workers // 2, "1": workers // 2}
    assert all(place["visible"] == place["gpus"][0] for place in places)
    assert all(place["threads"] == 1 for place in places)
    if not torch.cuda.is_available():
        assert {place["device"] for place in places} == {"cpu"}


@pytest.fixture
def deadly(tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], str]:
    """Settings of a run in which one client of the first round kills whoever trains it, and that client."""
    config = tiny()
    clients = Federation(config).clients
    victim = cohort(config, clients, 1)[1]
    row = int(Federation(config).index.train[victim][0])
    monkeypatch.setenv("FEDLORA_TEST_ROW", str(row))
    monkeypatch.setenv("FEDLORA_TEST_MARKER", str(tmp_path / "marker"))
    settings = [f"task.name={helpers.__file__}:Deadly", "engine=cohort", "engine.tokens=60", "rounds=2"]
    return settings, victim


def test_a_worker_that_dies_once_is_replaced_and_nothing_changes(
    tiny: Compose, tmp_path: Path, deadly: tuple[list[str], str]
) -> None:
    settings, _ = deadly
    start(tiny(*settings, "engine.workers=2"), tmp_path / "killed")
    assert (tmp_path / "marker").exists()
    assert (tmp_path / "killed" / "log.txt").read_text().count("started anew") == 1
    start(tiny(*settings, "engine.workers=0"), tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_cohort_that_kills_every_worker_fails_alone_and_says_so(
    tiny: Compose, tmp_path: Path, deadly: tuple[list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, victim = deadly
    monkeypatch.setenv("FEDLORA_TEST_MARKER", str(tmp_path / "missing" / "marker"))
    start(tiny(*settings, "engine.workers=2", "rounds=1"), tmp_path / "run")
    failures = rounds_of(tmp_path / "run")[1]["failures"]
    assert victim in failures
    assert len(failures) < 4  # the others of its cohort at most
    assert all("the process that trained it died 2 times" in reason for reason in failures.values())
    assert "client.lr" not in failures[victim]


@pytest.mark.slow
def test_a_cohort_that_does_not_fit_is_halved_and_stays_so_when_resumed(tiny: Compose, tmp_path: Path) -> None:
    settings = [f"task.name={helpers.__file__}:SmallMemory", "engine=cohort", "engine.tokens=400", "engine.workers=1"]
    config = tiny(*settings, "cohort.size=6")
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(client=15)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    for name in ("whole", "killed"):
        lowered = re.findall(r"from now on engine\.tokens = (\d+)", (tmp_path / name / "log.txt").read_text())
        assert lowered[0] == "200"
        written = yaml.safe_load((tmp_path / name / "config.yaml").read_text())["engine"]["tokens"]
        assert written == int(lowered[-1])


class Memory(Callback):
    """Notes the memory of this process and of its actors after every round."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.used: list[list[float]] = []

    def on_round_end(self, record: Mapping[str, Any]) -> None:
        pids = [None, *map(int, re.findall(r"'pid': (\d+)", self.log.read_text()))]
        self.used.append([psutil.Process(pid).memory_info().rss / 1e6 for pid in pids])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_the_same_after_ten_rounds_and_after_fifty(tiny: Compose, tmp_path: Path, workers: int) -> None:
    memory = Memory(tmp_path / "run" / "log.txt")
    settings = [*COHORT, f"engine.workers={workers}", "method=fedex", "rounds=50", "eval.every=25"]
    start(tiny(*settings), tmp_path / "run", callbacks=[memory])
    assert len(memory.used[1]) == 1 + workers
    for early, late in zip(memory.used[10], memory.used[50], strict=True):
        assert late - early < 8
