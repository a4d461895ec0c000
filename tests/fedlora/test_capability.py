"""Who trains what: declared, drawn once, the same in every process; and nobody sends what it did not train."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedlora import wire
from fedlora.capability import assigned, modules_named
from fedlora.client import Worker
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.store import ClientStore
from simulations.plan import plan_run
from simulations.simulate import start
from tests.conftest import Compose
from tests.fedlora.helpers import request

MIXED = "adapter.client_modules=[all,value]"
BOTH = "adapter.target_modules=[query,value]"


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.integers(0, 1000))
def test_a_list_is_taken_in_turn(choices: list[int], position: int) -> None:
    assert assigned(choices, position, 1, "rank", "anybody") == choices[position % len(choices)]


def test_a_distribution_is_drawn_with_its_shares() -> None:
    shares = {16: 1.0, 4: 3.0, 2: 4.0}
    drawn = Counter(assigned(shares, 0, 7, "rank", f"client {i}") for i in range(4000))
    for rank, share in shares.items():
        expected = share / 8
        assert drawn[rank] / 4000 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5)


@given(st.integers(0, 500), st.integers(0, 500), st.text(max_size=8))
def test_a_draw_depends_on_the_seed_and_the_client_alone(one: int, other: int, client: str) -> None:
    shares = {"all": 0.5, "query": 0.5}
    assert assigned(shares, one, 3, "modules", client) == assigned(shares, other, 3, "modules", client)


def test_modules_are_named_with_a_plus_and_all_is_all() -> None:
    assert modules_named("query+value") == ("query", "value")
    assert modules_named("all") == ()


def test_drawn_ranks_and_modules_reach_the_clients(tiny: Compose) -> None:
    ranks = Federation(tiny("method=flora", "adapter.rank=4", "adapter.client_ranks={4: 1, 2: 1}"))
    assert {ranks.capability(client).rank for client in ranks.clients} == {4, 2}
    modules = Federation(tiny("method=ffa", BOTH, "adapter.client_modules={all: 1, value: 1}"))
    assert {modules.capability(client).modules for client in modules.clients} == {(), ("value",)}
    assert modules.capability("central").modules == ()


def test_a_client_trains_and_sends_its_modules_and_holds_the_others_as_they_were_sent(
    tiny: Compose, tmp_path: Path
) -> None:
    worker = Worker(Federation(tiny("method=ffa", BOTH, MIXED)), ClientStore(tmp_path))
    able, weak = worker.federation.clients[:2]
    trained = {}
    for client in (able, weak):
        arrays = wire.pack(worker.model.read(worker.model.shared))
        job = worker.open(request(1, arrays, **{"client-id": client}))
        before = dict(job.member.state)
        after = worker.trainer.train([job.member])[0].state
        trained[client] = {key for key, value in after.items() if not value.equal(before[key])}
    assert any(".query." in key for key in trained[able])
    assert trained[weak]
    assert not any(".query." in key for key in trained[weak])
    assert set(worker.answer_layout(weak)) == {key for key in worker.layout(weak) if ".query." not in key}
    assert worker.answer_layout(able) == worker.layout(able)


@pytest.mark.parametrize("method", ["ffa", "fedit", "fedex", "flora", "rolora", "fedsvd"])
def test_an_exact_mean_stays_exact_where_clients_train_different_modules(
    tiny: Compose, tmp_path: Path, method: str
) -> None:
    config = tiny(f"method={method}", BOTH, MIXED, "rounds=3", "client.lr=1e-2")
    planned = plan_run(config)
    summary = start(config, tmp_path / "run")
    error = summary["aggregation_error"]["max"]
    assert error > 1e-4 if method == "fedit" else error <= 1e-6
    for key in ("payload_up", "payload_down", "setup_bytes"):
        assert summary["totals"][key] == planned[key], key
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    assert ledger[(ledger.direction == "up") & (ledger.payload > 0)].groupby("round").payload.nunique().max() == 2


def test_engines_agree_where_clients_train_different_modules(tiny: Compose, tmp_path: Path) -> None:
    for engine in ("loop", "cohort"):
        settings = ["method=ffa", BOTH, MIXED, "cohort.size=null", "client.lr=3e-2", "client.local_epochs=3"]
        settings += [f"engine={engine}", "engine.threads=1"]
        start(tiny(*settings, *(["engine.tokens=400"] if engine == "cohort" else [])), tmp_path / engine)
    one, two = (load_file(tmp_path / e / "adapter" / "fedlora_state.safetensors") for e in ("loop", "cohort"))
    for key, value in one.items():
        assert value.sub(two[key]).abs().max() <= 1e-4, key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.client_modules=[all,gate]"], r"names 'gate'.*modules that end in: query, value"),
        (["adapter.client_modules=[]"], r"adapter\.client_modules"),
        (["adapter.client_modules={all: 0}"], r"adapter\.client_modules"),
        (["method=flora", MIXED, "adapter.client_ranks=[4,2]"], "both set"),
        ([MIXED, "strategy._target_=flwr.serverapp.strategy.FedAvg"], "FedAvg of Flower cannot aggregate"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_at_the_start(
    tiny: Compose, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        start(tiny(BOTH, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
