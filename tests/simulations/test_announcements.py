"""A client says once what it can train; the server goes by that alone, and what it cannot serve costs that client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.capability import Capability, announced, announcement
from fedlora.client import Worker, client_app
from fedlora.config import Config
from fedlora.errors import FedloraError
from fedlora.federation import Federation
from fedlora.protocol import CAPABILITY
from fedlora.store import ClientStore
from simulations.engines.loop import LoopGrid
from simulations.plan import plan_run
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder
from simulations.simulate import resume, start
from strategies.build import build_strategy
from tests.conftest import Compose
from tests.simulations.test_resume import KillAt, Killed, assert_same_run
from tests.simulations.test_rounds import rounds_of

RANKS = ["method=flexlora", "adapter.client_ranks=[4,2]"]
HEADS = ["method=ravan", "adapter.rank=3", "adapter.heads=4", "adapter.client_heads={4: 1, 1: 1}"]
MODULES = ["method=fedex", "adapter.target_modules=[query,value]", "adapter.client_modules=[all,value]"]
DIFFERENT = {"ranks": RANKS, "heads": HEADS, "modules": MODULES}
NAMES = ("rank", "heads", "modules", "model")


@given(
    st.builds(
        Capability,
        rank=st.none() | st.integers(1, 99),
        heads=st.none() | st.integers(1, 9),
        modules=st.lists(st.text(min_size=1), max_size=3).map(tuple),
        model=st.none() | st.text(min_size=1),
    )
)
def test_what_is_announced_is_what_is_understood(capability: Capability) -> None:
    assert announced(dict(ConfigRecord(announcement(capability))), NAMES) == capability


@pytest.mark.parametrize(
    "said",
    [{"rank": 0}, {"rank": "4"}, {"rank": 2.5}, {"rank": True}, {"heads": [2]}, {"modules": "value"}, {"modules": []},
     {"modules": [1]}, {"model": ""}, {"model": 3}],
    ids=str,
)  # fmt: skip
def test_values_of_another_kind_are_refused_with_what_to_announce(said: dict[str, Any]) -> None:
    (name,) = said
    with pytest.raises(FedloraError, match=rf"announces {name} = .*: announce a "):
        announced(said, NAMES)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_client_is_asked_once_when_it_is_first_met_and_the_plan_has_it(
    tiny: Compose, tmp_path: Path, kind: str
) -> None:
    config = tiny(*DIFFERENT[kind], "rounds=4")
    planned, summary = plan_run(config), start(config, tmp_path / "run")
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    met: set[str] = set()
    for record, expected in zip(rounds_of(tmp_path / "run")[1:], planned["per_round"], strict=True):
        new = [client for client in record["cohort"] if client not in met]
        rows = ledger[ledger["round"] == record["round"]]
        questions, rest = rows[: 2 * len(new)], rows[2 * len(new) :]
        assert questions.client.tolist() == new * 2
        assert questions.direction.tolist() == ["down"] * len(new) + ["up"] * len(new)
        assert not questions[["payload", "setup"]].any(axis=None)
        assert (questions.message > 0).all()
        assert len(rest) == 2 * len(record["cohort"])
        assert (rest.payload > 0).all()
        met |= set(new)
        for key in ("payload_up", "payload_down", "setup_bytes"):
            assert record[key] == expected[key], key
        for key in ("message_up", "message_down", "transport_up", "transport_down"):
            assert record[key] == pytest.approx(expected[key], rel=1e-4)
    assert summary["totals"]["payload_up"] == planned["payload_up"]


def test_private_models_are_announced(digits: Compose, tmp_path: Path) -> None:
    config = digits("pfedlora")
    planned, summary = plan_run(config), start(config, tmp_path / "run")
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    assert len(ledger[ledger.payload == 0]) == 2 * ledger.client.nunique()
    for key in ("message_up", "message_down", "transport_up", "transport_down"):
        assert summary["totals"][key] == pytest.approx(planned[key], rel=1e-4)


@pytest.mark.parametrize("overrides", [["method=ffa"], ["method=local", "adapter.client_ranks=[4,2]"]], ids=str)
def test_nobody_is_asked_where_clients_do_not_differ_or_do_not_communicate(
    tiny: Compose, tmp_path: Path, overrides: list[str]
) -> None:
    start(tiny(*overrides), tmp_path / "run")
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    assert len(ledger) == (0 if "method=local" in overrides else 2 * 3 * 4)


class Clients(LoopGrid):
    """Clients with a configuration of their own, whose announcements ``change`` may replace."""

    def __init__(
        self, config: Config, folder: Path, change: Callable[[str, Message], Message] = lambda client, reply: reply
    ) -> None:
        worker = Worker(Federation(config), ClientStore(folder))
        super().__init__(client_app(lambda: worker))
        self.change, self.asked = change, []

    def _handle(self, request: Message) -> Message:
        reply = super()._handle(request)
        if request.metadata.message_type != MessageType.QUERY:
            return reply
        self.asked.append(self.client_of(request.metadata.dst_node_id))
        return self.change(self.asked[-1], reply)


def run_on(engine: Clients, config: Config, folder: Path) -> list[dict[str, Any]]:
    """The rounds of ``config`` with the clients of ``engine``."""
    run_folder = RunFolder(folder)
    config = config.model_copy(update={"run_dir": str(folder)})
    run_folder.create(config)
    worker = Worker(Federation(config), run_folder.store)
    FederatedRun(worker, build_strategy(config.strategy, worker.model), run_folder).run(engine)
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("servers", "clients"),
    [
        (RANKS, ["method=flexlora", "adapter.client_ranks=[1,3,2]"]),
        (HEADS, [*HEADS[:-1], "adapter.client_heads=[2,3]"]),
        (MODULES, [*MODULES[:-1], "adapter.client_modules=[value,query,all]"]),
    ],
    ids=["ranks", "heads", "modules"],
)
def test_the_server_goes_by_what_is_announced_alone(
    tiny: Compose, tmp_path: Path, servers: list[str], clients: list[str]
) -> None:
    """The clients are others than the server's configuration says: its run is theirs, bit by bit."""
    rounds = run_on(Clients(tiny(*clients), tmp_path / "c1"), tiny(*servers), tmp_path / "run")
    expected = run_on(Clients(tiny(*clients), tmp_path / "c2"), tiny(*clients), tmp_path / "expected")
    for record in (*rounds, *expected):
        assert not record["failures"]
        del record["seconds"]
    assert rounds == expected
    own = run_on(Clients(tiny(*servers), tmp_path / "c3"), tiny(*servers), tmp_path / "own")
    assert [record["payload_up"] for record in own] != [record["payload_up"] for record in rounds]


REFUSED = {
    "rank": (RANKS, {"rank": 5}, r"rank 5 is above adapter\.rank = 4: announce at most 4"),
    "kind": (RANKS, {"rank": "two"}, r"announces rank = 'two': announce a positive whole number"),
    "other": (RANKS, {"modules": ["value"]}, r"announces 'modules', and clients of this run differ in rank only"),
    "heads": (HEADS, {"heads": 5}, r"5 heads are more than adapter\.heads = 4: announce at most 4"),
    "module": (MODULES, {"modules": ["gate"]}, r"names 'gate'.*modules that end in: query, value"),
    "record": (RANKS, None, r"it holds no 'capability' record"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_announcement_that_cannot_be_served_costs_that_client_only(tiny: Compose, tmp_path: Path, case: str) -> None:
    settings, said, reason = REFUSED[case]
    config = tiny(*settings, "cohort.size=null", "rounds=2")
    wrong = Federation(config).clients[3]

    def change(client: str, reply: Message) -> Message:
        if client == wrong:
            reply.content = RecordDict({} if said is None else {CAPABILITY: ConfigRecord(said)})
        return reply

    engine = Clients(config, tmp_path / "clients", change)
    rounds = run_on(engine, config, tmp_path / "run")
    assert engine.asked.count(wrong) == 2  # again in its next round
    assert len(engine.asked) == len(Federation(config).clients) + 1
    for record in rounds[1:]:
        assert set(record["failures"]) == {wrong}
        assert record["aggregation_error"] is not None
        assert wrong in record["cohort"]
        with pytest.raises(FedloraError, match=rf"announcement cannot be served: .*{reason}"):
            raise FedloraError(record["failures"][wrong])


def test_where_no_announcement_can_be_served_the_run_says_why(tiny: Compose, tmp_path: Path) -> None:
    config = tiny(*RANKS)

    def change(client: str, reply: Message) -> Message:
        reply.content = RecordDict({CAPABILITY: ConfigRecord({"rank": 64})})
        return reply

    with pytest.raises(FedloraError, match=r"every client failed\. Client 'site .*': .*rank 64 is above"):
        run_on(Clients(config, tmp_path / "clients", change), config, tmp_path / "run")


@pytest.mark.parametrize("kill", [{"client": 2}, {"client": 11}, {"round_end": 2}], ids=str)
@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_killed_run_knows_its_clients_when_it_resumes(
    tiny: Compose, tmp_path: Path, kind: str, kill: dict[str, int]
) -> None:
    config = tiny(*DIFFERENT[kind])
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(**kill)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("kind", DIFFERENT)
def test_the_cohort_engine_asks_as_the_loop_does(tiny: Compose, tmp_path: Path, kind: str) -> None:
    for engine in ("loop", "cohort"):
        start(tiny(*DIFFERENT[kind], f"engine={engine}", "engine.threads=1"), tmp_path / engine)
    one, two = (pd.read_parquet(tmp_path / engine / "ledger.parquet") for engine in ("loop", "cohort"))
    pd.testing.assert_frame_equal(one, two)
