"""Clients that drop out, crash, are late or lie: what it costs, what is written down, and that it can be repeated."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from fedlora.client import Worker, client_app
from fedlora.config import Config, FaultsConfig
from fedlora.errors import FedloraError, InputError
from fedlora.federation import Federation
from fedlora.grid import NOT_NEEDED, ClientGrid
from fedlora.privacy.budget import Budget
from fedlora.privacy.client_level import epsilon_of
from simulations.engines.loop import LoopGrid
from simulations.faults import CRASHED, DROPPED, FaultGrid, fate_of
from simulations.plan import plan_run
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder
from simulations.sampler import cohort
from simulations.simulate import resume, start
from strategies import FederatedStrategy, weighted_mean
from strategies.build import build_strategy
from tests.conftest import Compose
from tests.fedlora.helpers import Engine, request
from tests.simulations.test_resume import KillAt, Killed, assert_same_run
from tests.simulations.test_rounds import rounds_of

SECRET = ["privacy=client", "privacy.clip=1", "privacy.epsilon=8", "privacy.secret_cohort=true"]
RANDOM = ["faults=random", "faults.dropout=0.3", "faults.crash=0.1", "faults.delay=2", "cohort.deadline=3"]


def expected_fates(config: Config, server_round: int, clients: tuple[str, ...]) -> dict[str, str]:
    """Why clients fail in a round, by the fate of each."""
    found = {}
    for client in clients:
        fate = fate_of(config.faults, config.seed, server_round, client)
        late = config.cohort.deadline is not None and fate.delay > config.cohort.deadline
        deadline = f"late: no reply within {config.cohort.deadline:g} s" if late else ""
        reason = DROPPED if fate.dropped else deadline or (CRASHED if fate.crashed else "")
        if reason:
            found[client] = reason
    return found


def ledger_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "ledger.parquet")


# Fates ----------------------------------------------------------------------------------------------------------------


def test_fates_have_the_frequencies_that_are_asked_for():
    faults = FaultsConfig(name="random", dropout=0.3, crash=0.1, delay=2.0)
    fates = [fate_of(faults, 1, server_round, f"c{c}") for server_round in range(40) for c in range(50)]
    assert sum(fate.dropped for fate in fates) / 2000 == pytest.approx(0.3, abs=0.04)
    assert sum(fate.crashed for fate in fates) / 2000 == pytest.approx(0.1, abs=0.03)
    assert sum(fate.delay for fate in fates) / 2000 == pytest.approx(2.0, rel=0.1)
    assert sum(fate.delay > 3 for fate in fates) / 2000 == pytest.approx(math.exp(-1.5), abs=0.04)


def test_a_fate_depends_on_seed_round_and_client_alone():
    faults = FaultsConfig(name="random", delay=2.0)
    delays = {
        fate_of(faults, seed, r, c).delay for seed in (1, 2) for r in (1, 2) for c in ("a", "b") for _ in range(2)
    }
    assert len(delays) == 8
    raised = FaultsConfig(name="random", delay=2.0, dropout=0.9)  # one setting does not move the draws of another
    assert fate_of(raised, 1, 1, "a").delay == fate_of(faults, 1, 1, "a").delay


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedex", "fed_sb", "fedsa", "flora"])
def test_every_failure_is_the_fate_of_its_client_and_is_written_down(tiny: Compose, tmp_path: Path, method: str):
    config = tiny(f"method={method}", *RANDOM, "rounds=5", "cohort.size=8", "cohort.min_replies=1")
    start(config, tmp_path / "run")
    ledger = ledger_of(tmp_path / "run")
    seen: set[str] = set()
    for record in rounds_of(tmp_path / "run")[1:]:
        expected = expected_fates(config, record["round"], tuple(record["cohort"]))
        assert record["failures"] == expected
        up = ledger[(ledger["round"] == record["round"]) & (ledger.direction == "up")]
        assert dict(zip(up.client, up.status, strict=True)) == {c: expected.get(c, "ok") for c in record["cohort"]}
        assert (up.payload[up.status != "ok"] == 0).all()
        assert (up.message[up.status.str.startswith("late")] == 0).all()
        assert record["aggregation_error"] is not None or method == "fedsa"
        seen |= {reason.split()[0] for reason in expected.values()}
    assert seen == {"dropped", "crashed", "late:"}


def test_exact_methods_stay_exact_over_those_who_answered(tiny: Compose, tmp_path: Path):
    for method in ("fedex", "fed_sb", "flora", "ravan"):
        config = tiny(f"method={method}", *RANDOM, "cohort.size=8", "cohort.min_replies=1", "client.lr=1e-2")
        assert start(config, tmp_path / method)["aggregation_error"]["max"] <= 1e-6


@pytest.mark.parametrize("kill", [{"client": 4}, {"round_end": 2}], ids=str)
@pytest.mark.parametrize("method", ["fedex", "fed_sb", "personal_lora"])
def test_a_killed_run_with_faults_resumes_to_the_same_bits(
    tiny: Compose, tmp_path: Path, method: str, kill: dict[str, int]
):
    config = tiny(f"method={method}", *RANDOM, "cohort.min_replies=3", "cohort.spares=2", "rounds=4")
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(**kill)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert any(record["failures"] for record in rounds_of(tmp_path / "whole"))


def test_the_same_replies_count_on_every_engine(tiny: Compose, tmp_path: Path):
    settings = ["method=ffa", *RANDOM, "faults.dropout=0.1", "cohort.spares=4", "cohort.min_replies=2"]
    start(tiny(*settings), tmp_path / "loop")
    start(tiny(*settings, "engine=cohort"), tmp_path / "other")
    one, two = ledger_of(tmp_path / "loop"), ledger_of(tmp_path / "other")
    pd.testing.assert_frame_equal(one, two)
    assert NOT_NEEDED in set(one.status)
    states = [load_file(tmp_path / name / "adapter" / "fedlora_state.safetensors") for name in ("loop", "other")]
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-3, atol=1e-5)


def test_methods_of_one_seed_meet_the_same_faults_and_baselines_none(tiny: Compose, tmp_path: Path):
    found = {}
    for method in ("fedit", "ffa", "local", "central"):
        start(tiny(f"method={method}", *RANDOM, "cohort.spares=2", "cohort.min_replies=1"), tmp_path / method)
        found[method] = [(r["cohort"], r["failures"]) for r in rounds_of(tmp_path / method)[1:]]
    assert found["fedit"] == found["ffa"]
    for method in ("local", "central"):
        assert [failures for _, failures in found[method]] == [{}, {}, {}]
        assert [chosen for chosen, _ in found[method]] == [chosen[:4] for chosen, _ in found["ffa"]]


def test_who_drops_out_does_no_work_and_who_crashes_or_is_late_does():
    worked: list[str] = []

    def answer(message: Message) -> Message:
        worked.append(str(message.content.config_records["config"]["client-id"]))
        return Message(message.content, reply_to=message)

    faults = FaultsConfig(name="random", dropout=0.3, crash=0.3, delay=2.0)
    grid, clients = FaultGrid(Engine(answer), faults, 7), [f"c{number}" for number in range(60)]
    grid.begin_round(3, clients)
    requests = [request(grid.address(client), **{"client-id": client}) for client in clients]
    for number, message in enumerate(requests):
        message.metadata.__dict__["_message_id"] = str(number)
    replies = grid.send_and_receive(requests, timeout=3.0)
    fates = {client: fate_of(faults, 7, 3, client) for client in clients}
    assert sorted(worked) == sorted(client for client, fate in fates.items() if not fate.dropped)
    for client, reply in zip(clients, replies, strict=True):
        fate = fates[client]
        fails = fate.dropped or fate.crashed or fate.delay > 3.0
        assert reply.has_error() == fails, client
    # Who waits for all has no late ones.
    patient = grid.send_and_receive(requests, timeout=None)
    assert {r.error.reason for r in patient if r.has_error()} == {DROPPED, CRASHED}


# Spares and rounds that are skipped -----------------------------------------------------------------------------------


def test_spares_are_others_and_do_not_change_who_is_drawn_first(tiny: Compose):
    plain, spared = tiny(), tiny("cohort.spares=3")
    clients = Federation(plain).clients
    extra = set()
    for server_round in range(1, 9):
        drawn = cohort(spared, clients, server_round)
        assert drawn[:4] == cohort(plain, clients, server_round)
        assert len(set(drawn)) == 7
        extra.add(drawn[4:])
    assert len(extra) > 4


def test_without_faults_spares_change_nothing_but_bytes(tiny: Compose, tmp_path: Path):
    start(tiny("method=fedex", "cohort.size=2"), tmp_path / "plain")
    config = tiny("method=fedex", "cohort.size=2", "cohort.spares=2")
    summary = start(config, tmp_path / "spared")
    one, two = (load_file(tmp_path / n / "adapter" / "fedlora_state.safetensors") for n in ("plain", "spared"))
    assert all(one[key].equal(two[key]) for key in one)
    ledger = ledger_of(tmp_path / "spared")
    assert (ledger.status[ledger.direction == "up"] == NOT_NEEDED).sum() == 2 * 3
    assert [r["failures"] for r in rounds_of(tmp_path / "spared")] == [{}] * 4
    assert summary["failures"] == 0
    planned = plan_run(config)
    assert {k: summary["totals"][k] for k in ("payload_up", "payload_down")} == {
        k: planned[k] for k in ("payload_up", "payload_down")
    }


class Recorder(FederatedStrategy):
    """The mean, and who was in it."""

    folded: list[tuple[str, ...]]

    def fold(self, server_round: int, state: Any, replies: Any) -> Any:
        self.folded.append(tuple(reply.client for reply in replies))
        assert math.isclose(sum(reply.weight for reply in replies), 1.0)
        assert all(reply.weight > 0 for reply in replies)
        return weighted_mean(replies)


def run_recorded(config: Config, folder: Path, engine: Callable[[Worker], ClientGrid] | None = None) -> Recorder:
    run_folder = RunFolder(folder)
    config = config.model_copy(update={"run_dir": str(folder)})
    worker = Worker(Federation(config), run_folder.store)
    run_folder.create(config)
    strategy = Recorder()
    strategy.folded = []
    run = FederatedRun(worker, strategy, run_folder)
    run.run(LoopGrid(client_app(lambda: worker)) if engine is None else engine(worker))
    run.ledger.write(run_folder.ledger_file)
    return strategy


def test_exactly_the_first_usable_replies_are_folded(tiny: Compose, tmp_path: Path):
    config = tiny(*RANDOM, "cohort.spares=4", "cohort.size=3", "cohort.min_replies=1", "rounds=6")
    strategy = run_recorded(config, tmp_path / "run")
    records = rounds_of(tmp_path / "run")[1:]
    for record, folded in zip(records, strategy.folded, strict=True):
        usable = [client for client in record["cohort"] if client not in record["failures"]]
        assert folded == tuple(usable[:3])
    assert any(folded != tuple(r["cohort"][:3]) for r, folded in zip(records, strategy.folded, strict=True))


@pytest.mark.parametrize("what", ["method=fedex", "method=fed_sb", "strategy._target_=flwr.serverapp.strategy.FedAdam"])
def test_a_round_with_too_few_replies_changes_nothing_and_is_written_down(tiny: Compose, tmp_path: Path, what: str):
    settings = ["faults=random", "faults.dropout=0.4", "cohort.min_replies=2", "rounds=8", "eval.every=1"]
    start(tiny(what, *settings), tmp_path / "run")
    skipped = 0
    for before, record in pairwise(rounds_of(tmp_path / "run")):
        usable = 4 - len(record["failures"])
        if usable < 2:
            skipped += 1
            reason = f"skipped: {usable} usable replies, and cohort.min_replies = 2"
            assert record["aggregation_error_reason"] == reason
            assert record["loss"] is None
            assert record["metrics"] == before["metrics"]
        else:
            assert record["aggregation_error"] is not None
            assert record["metrics"] != before["metrics"]
    assert 0 < skipped < 8


class Deaf(LoopGrid):
    """Nobody ever answers."""

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        return []


def test_when_nobody_answers_the_run_ends_unless_min_replies_says_otherwise(tiny: Compose, tmp_path: Path):
    def deaf(worker: Worker) -> ClientGrid:
        return Deaf(client_app(lambda: worker))

    with pytest.raises(FedloraError, match=r"Round 1: every client failed.*late: no reply within 5 s"):
        run_recorded(tiny("cohort.deadline=5"), tmp_path / "ends", deaf)
    strategy = run_recorded(tiny("cohort.deadline=5", "cohort.min_replies=1"), tmp_path / "goes on", deaf)
    assert strategy.folded == []
    assert [len(r["failures"]) for r in rounds_of(tmp_path / "goes on")] == [0, 4, 4, 4]


def test_clients_that_cannot_be_met_are_not_asked(tiny: Compose, tmp_path: Path):
    ranks = ["method=flexlora", "adapter.client_ranks=[4,2]", "cohort.min_replies=2"]
    config = tiny(*ranks, "faults=random", "faults.dropout=0.6", "rounds=6")
    start(config, tmp_path / "run")
    ledger = ledger_of(tmp_path / "run")
    assert ledger.status.str.contains("dropped out").any()
    met: set[str] = set()
    for record in rounds_of(tmp_path / "run")[1:]:
        fates = expected_fates(config, record["round"], tuple(record["cohort"]))
        rows = ledger[(ledger["round"] == record["round"]) & (ledger.direction == "down")]
        for client in record["cohort"]:
            asked = 1 if client in met or client in fates else 2  # a question first, and training if it was answered
            assert (rows.client == client).sum() == asked
        met |= set(record["cohort"]) - set(fates)
        assert set(record["failures"]) == set(fates)


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "FedMedian"])
def test_a_client_that_keeps_its_loss_does_not_end_a_run_of_flowers_strategies(
    tiny: Compose, tmp_path: Path, strategy: str
):
    class Quiet(LoopGrid):
        def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
            replies = super().exchange(requests, timeout)
            del replies[1].content.metric_records["metrics"]["train_loss"]
            return replies

    config = tiny(f"strategy._target_=flwr.serverapp.strategy.{strategy}", "rounds=2")
    worker = Worker(Federation(config), RunFolder(tmp_path / "run").store)
    RunFolder(tmp_path / "run").create(config)
    run = FederatedRun(worker, build_strategy(config.strategy, worker.model), RunFolder(tmp_path / "run"))
    run.run(Quiet(client_app(lambda: worker)))
    for record in rounds_of(tmp_path / "run")[1:]:
        assert (record["failures"], record["loss"]) == ({}, None)
        assert record["aggregation_error"] is not None


# Privacy --------------------------------------------------------------------------------------------------------------


def test_with_record_privacy_a_late_client_has_spent_and_a_dropped_one_has_not(tiny: Compose, tmp_path: Path):
    private = ["privacy=record", "privacy.epsilon=null", "privacy.noise_multiplier=1.0", "method=ffa"]
    config = tiny(*private, *RANDOM, "cohort.size=8", "cohort.min_replies=1", "rounds=4")
    summary = start(config, tmp_path / "run")
    federation = Federation(config)
    store = RunFolder(tmp_path / "run").store
    budget = Budget(store, config.privacy)
    released = dict.fromkeys(federation.clients, 0)
    for record in rounds_of(tmp_path / "run")[1:]:
        for client in record["cohort"]:
            released[client] += record["failures"].get(client) != DROPPED
    lines = {
        client: len(budget.path(client).read_text().splitlines()) if budget.path(client).exists() else 0
        for client in federation.clients
    }
    assert lines == released
    worker = Worker(federation, store)
    spent = worker.spent(federation.clients, 4)
    assert summary["privacy"]["epsilon"] == pytest.approx(max(spent.values()))
    assert len(set(released.values())) > 2


def test_a_late_reply_is_counted_in_the_epsilon_of_the_run(tiny: Compose, tmp_path: Path):
    class LateAtLast(LoopGrid):
        """In round 2 nobody is heard any more, though all have trained."""

        def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
            replies = super().exchange(requests, timeout)
            return [] if self.server_round == 2 else replies

    private = ["privacy=record", "privacy.epsilon=null", "privacy.noise_multiplier=1.0", "cohort.min_replies=1"]
    config = tiny(*private, "cohort.size=null", "rounds=2")
    run_recorded(config, tmp_path / "run", lambda worker: LateAtLast(client_app(lambda: worker)))
    first, second = (record["epsilon"] for record in rounds_of(tmp_path / "run")[1:])
    assert second > first


@pytest.mark.parametrize("noise", ["server", "clients"])
def test_client_privacy_composes_with_faults_spares_and_skipped_rounds(tiny: Compose, tmp_path: Path, noise: str):
    private = ["privacy=client", "privacy.clip=0.5", "privacy.epsilon=null", "privacy.noise_multiplier=0.5"]
    private += ["strategy.weighting=uniform", "method=ffa", f"privacy.noise={noise}"]
    config = tiny(*private, *RANDOM, "cohort.spares=2", "cohort.min_replies=3", "rounds=6")
    summary = start(config, tmp_path / "run")
    times = max(
        sum(client in cohort(config, Federation(config).clients, r) for r in range(1, 7))
        for client in Federation(config).clients
    )
    delta = summary["privacy"]["delta"]
    assert summary["privacy"]["epsilon"] == pytest.approx(epsilon_of(0.5, times, delta, "rdp", None))
    reasons = {record["aggregation_error_reason"].split(":")[0] for record in rounds_of(tmp_path / "run")[1:]}
    assert reasons == {"clipped and noisy", "skipped"}


def test_a_secret_cohort_that_is_larger_than_expected_counts_whole(tiny: Compose, tmp_path: Path):
    config = tiny(*SECRET, "method=ffa", "strategy.weighting=uniform", "cohort.size=2", "rounds=8")
    start(config, tmp_path / "run")
    drawn = sum(len(cohort(config, Federation(config).clients, r)) for r in range(1, 9))
    assert max(len(cohort(config, Federation(config).clients, r)) for r in range(1, 9)) > 2
    up = ledger_of(tmp_path / "run").query("direction == 'up'")
    assert len(up) == drawn
    assert set(up.status) == {"ok"}


# Settings that cannot work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cohort.spares=20"], r"cohort\.size \+ cohort\.spares = 24, but there are only .* Use cohort\.spares <="),
        (["cohort.size=null", "cohort.spares=1"], r"cohort\.spares are asked beside"),
        (["cohort.min_replies=5"], r"cohort\.min_replies = 5 is more than cohort\.size = 4"),
        (["cohort.deadline=0"], r"cohort\.deadline"),
        (["faults=random", "faults.delay=1"], r"faults\.delay has no effect without cohort\.deadline"),
        (["faults.dropout=0.1"], r"faults\.dropout"),
        (["faults=random", "faults.dropout=1.5"], r"faults\.dropout"),
        ([*SECRET, "cohort.spares=1"], "coin of its own"),
        ([*SECRET, "cohort.min_replies=1"], "coin of its"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(tiny: Compose, overrides: list[str], message: str):
    with pytest.raises(InputError, match=message):
        Federation(tiny(*overrides))
