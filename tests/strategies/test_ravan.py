"""RAVAN's clients that train some heads: which, what travels, and in what sense their aggregate is exact."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora import wire
from fedlora.adapters import State
from fedlora.adapters.ravan import head_names
from fedlora.capability import Capability
from fedlora.client import Worker
from fedlora.client_axis import ClientAxis
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.grid import parts_of
from fedlora.lowrank import LowRank, relative_distance
from fedlora.store import ClientStore
from simulations.plan import plan_run
from simulations.simulate import resume, start
from strategies import Ravan, weighted_mean
from strategies.base import Reply, Server
from strategies.means import completed, weights
from tests.conftest import Compose
from tests.fedlora.helpers import assert_same, random_state, request
from tests.simulations.test_cohort import assert_engines_agree
from tests.simulations.test_resume import KillAt, Killed, assert_same_run

HEADS = 4
SIZE = ["method=ravan", f"adapter.heads={HEADS}", "adapter.rank=3", "adapter.alpha=5"]
RECTANGULAR = "adapter.target_modules=[query,intermediate.dense,output.dense]"
MIXED = [*SIZE, RECTANGULAR, "adapter.client_heads=[4,2,1]", "cohort.size=6", "client.lr=2e-2"]
EXAMPLES = (50, 3, 20, 7)


def asked(strategy: Ravan, clients: list[str], server_round: int) -> list[tuple[str, ...]]:
    return [parts_of(strategy.send(client, server_round, {}).instructions) for client in clients]


def ready(federation: Federation, counts: list[int | None]) -> Ravan:
    """The strategy where the clients ``"0"``, ``"1"``, ... can train as many heads as ``counts`` says."""
    strategy = Ravan()
    strategy.prepare(federation.build_meta_model())
    strategy.begin_run(Server({}, lambda state: {}, lambda client: Capability(heads=counts[int(client)])))
    return strategy


@given(st.lists(st.integers(1, HEADS - 1), min_size=1, max_size=9), st.integers(1, 50))
def test_the_heads_of_a_round_are_trained_equally_often(counts: list[int], server_round: int) -> None:
    strategy = Ravan()
    strategy._heads = HEADS
    strategy.begin_run(Server({}, lambda state: {}, lambda client: Capability(heads=counts[int(client)])))
    parts = asked(strategy, [str(i) for i in range(len(counts))], server_round)
    assert [len(set(part)) for part in parts] == counts
    often = Counter(name for part in parts for name in part)
    times = [often[name] for name in head_names(range(HEADS))]
    assert max(times) - min(times) <= 1


def test_every_client_comes_to_every_head_and_an_able_one_trains_all(tiny: Compose) -> None:
    strategy = ready(Federation(tiny(*SIZE)), [2, None, 2, HEADS, 1])
    trained: dict[str, set[str]] = {client: set() for client in "01234"}
    for server_round in range(1, HEADS + 1):
        for client, parts in zip("01234", asked(strategy, list("01234"), server_round), strict=True):
            trained[client] |= set(parts)
    assert trained["1"] == trained["3"] == set()  # not told which: all
    assert all(trained[client] == set(head_names(range(HEADS))) for client in "024")


def test_each_head_is_the_mean_of_the_clients_that_trained_it_with_their_weights_renormalised(tiny: Compose) -> None:
    """Head by head against dense products; the head that nobody trained stays."""
    federation = Federation(tiny(*SIZE, RECTANGULAR))
    model = federation.build_model()
    frozen = {key: value.double() for key, value in model.read(model.frozen).items()}
    sent = random_state(model, model.shared, seed=9)
    heads = [{0, 1}, {1}, {0, 1, 2}, {2}]  # nobody trains head 3
    shares, replies = weights(EXAMPLES, "examples"), []
    for i, numbers in enumerate(heads):
        layout = model.answer_layout(Capability(), head_names(numbers))
        trained = random_state(model, layout, seed=i)
        state = completed(trained, sent)
        replies.append(Reply(str(i), state, EXAMPLES[i], shares[i], 0.5, frozenset(trained)))
    strategy = ready(federation, [])
    folded = strategy.fold(1, sent, replies)

    def dense(state: State, module: str, i: int) -> torch.Tensor:
        b, a = (frozen[f"{module}.lora_{factor}.weight"] for factor in "BA")
        return (
            5 / 3 * b[:, 3 * i : 3 * i + 3] @ state[f"{module}.lora_H.head{i}.weight"].double() @ a[3 * i : 3 * i + 3]
        )

    for module, delta in model.delta(folded).items():
        total = torch.zeros_like(delta.dense(), dtype=torch.float64)
        for i in range(HEADS):
            who = [k for k in range(4) if i in heads[k]]
            mean = sum(EXAMPLES[k] * dense(replies[k].state, module, i) for k in who)
            total += mean / sum(EXAMPLES[k] for k in who) if who else dense(sent, module, i)
        assert (delta.dense().double() - total).norm() <= 1e-6 * total.norm()
        assert torch.equal(folded[f"{module}.lora_H.head3.weight"], sent[f"{module}.lora_H.head3.weight"])
    for key in model.head:
        assert torch.equal(folded[key], weighted_mean(replies, [key])[key])
    whole = {
        module: LowRank.sum([model.delta(r.state)[module].scale(r.weight) for r in replies]) for module in model.layers
    }
    assert relative_distance(whole, model.delta(folded)) > 0.1  # it is not the mean of whole updates


def test_where_all_clients_train_all_heads_it_is_the_plain_mean(tiny: Compose) -> None:
    federation = Federation(tiny(*SIZE))
    model = federation.build_model()
    shares = weights(EXAMPLES, "examples")
    states = [random_state(model, model.shared, seed) for seed in range(4)]
    replies = [Reply(str(i), s, n, p, 0.5) for i, (s, n, p) in enumerate(zip(states, EXAMPLES, shares, strict=True))]
    assert_same(ready(federation, []).fold(1, states[0], replies), weighted_mean(replies))


def test_a_weak_client_holds_all_heads_and_trains_and_sends_its_own(tiny: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny(*SIZE, "client.local_epochs=3")), ClientStore(tmp_path))
    model, client = worker.model, worker.federation.clients[0]
    sent = random_state(model, model.shared)
    mine = head_names([1, 3])
    job = worker.open(request(1, wire.pack(sent), **{"client-id": client, "train": list(mine)}))
    assert all(torch.equal(job.member.state[key], value) for key, value in sent.items())
    trained = worker.trainer.train([job.member])[0]
    for key, value in trained.state.items():
        changed = not torch.equal(value, job.member.state[key])
        assert changed == (key in model.head or key.split(".")[-2] in mine), key
    layout = worker.answer_layout(client, mine)
    assert {key for key in layout if key not in model.head} == {
        f"{module}.lora_H.{name}.weight" for module in model.layers for name in mine
    }
    reply = worker.close(job, trained)
    assert len(reply.content.array_records["arrays"][wire.PACKED].data) == 4 * sum(map(prod, layout.values()))


def test_the_plan_is_the_ledger_and_what_is_reported_is_the_error_of_each_heads_mean(
    tiny: Compose, tmp_path: Path
) -> None:
    config = tiny(*MIXED, "rounds=4")
    planned, summary = plan_run(config), start(config, tmp_path / "run")
    for key in ("payload_up", "payload_down", "setup_bytes"):
        assert summary["totals"][key] == planned[key], key
    for key in ("message_up", "message_down", "transport_up", "transport_down"):
        assert summary["totals"][key] == pytest.approx(planned[key], rel=1e-3)
    assert summary["aggregation_error"]["max"] <= 1e-6
    assert summary["failures"] == 0
    federation = Federation(config)
    model = federation.build_meta_model()
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    head = 4 * sum(prod(shape) for shape in model.shapes(model.head).values())
    one = 4 * len(model.layers) * 3 * 3
    for client, rows in ledger[(ledger.direction == "up") & (ledger.payload > 0)].groupby("client"):
        assert set(rows.payload) == {head + one * (federation.capability(str(client)).heads or 0)}
    assert ledger[(ledger.direction == "down") & (ledger.payload > 0)].payload.unique().tolist() == [head + HEADS * one]


@pytest.mark.parametrize("knobs", [[], ["client.keep_optimizer=true", "cohort.size=null"]], ids=["", "moments"])
def test_a_cohort_trains_different_heads_as_the_loop_does(tiny: Compose, tmp_path: Path, knobs: list[str]) -> None:
    assert_engines_agree(tiny, tmp_path, *MIXED, *knobs)


def test_the_heads_of_many_clients_are_one_grouped_product(tiny: Compose) -> None:
    axis = ClientAxis(Federation(tiny(*SIZE)).build_model())
    assert not axis.whole
    assert not axis.missing


def test_a_killed_run_resumes_to_the_same_bits(tiny: Compose, tmp_path: Path) -> None:
    config = tiny(*MIXED)
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(client=15)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_drawn_heads_reach_the_clients_and_the_label(tiny: Compose) -> None:
    federation = Federation(tiny(*SIZE, "adapter.client_heads={4: 1, 1: 1}"))
    assert {federation.capability(client).heads for client in federation.clients} == {4, 1}
    assert federation.adapter.label == "ravan[1..4x3]"


@pytest.mark.parametrize("more", [["adapter.client_modules=[all,query]"], ["eval.personalise=true"]], ids=str)
def test_weak_heads_go_with_weak_modules_and_with_personalised_evaluation(
    tiny: Compose, tmp_path: Path, more: list[str]
) -> None:
    summary = start(tiny(*MIXED, *more), tmp_path / "run")
    assert summary["aggregation_error"]["max"] <= 1e-6


def test_a_client_alone_trains_its_first_heads(tiny: Compose, tmp_path: Path) -> None:
    start(tiny(*MIXED, "strategy=local", "cohort.size=null", "rounds=1"), tmp_path / "run")
    store, federation = ClientStore(tmp_path / "run" / "clients"), Federation(tiny(*MIXED))
    for client in store.clients():
        kept = store.read(client, 1000).private
        trained = {
            key.split(".")[-2]
            for key, value in kept.items()
            if key.endswith("weight") and "lora_H" in key and value.any()
        }
        assert trained == set(head_names(range(federation.capability(client).heads or 0)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.client_heads=[5,1]"], r"client_heads holds 5.*adapter\.heads = 4.*adapter\.heads=5"),
        (["adapter.client_heads=[0]"], r"adapter\.client_heads"),
        (["adapter.client_heads=[2]", "strategy=average"], r"adapter\.client_heads.*Average.*strategy=ravan"),
        (["adapter=lora", "strategy=ravan"], r"strategy=ravan averages heads, and adapter=lora has none"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_is_refused_at_the_start(
    tiny: Compose, tmp_path: Path, overrides: list[str], message: str
) -> None:
    size = SIZE if "adapter=lora" not in overrides else []
    with pytest.raises(InputError, match=message):
        start(tiny(*size, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
