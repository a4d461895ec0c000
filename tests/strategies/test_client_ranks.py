"""Clients of different rank: what they train, what travels, and that aggregation keeps its promise."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pandas as pd
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from fedlora import wire
from fedlora.adapters import State
from fedlora.client import Worker
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.lowrank import relative_distance, weighted_mean
from fedlora.ranks import crop, pad
from fedlora.store import ClientStore
from simulations.plan import plan_run
from simulations.simulate import start
from strategies import FlexLoRA, FLoRA
from strategies.base import Reply
from strategies.build import build_strategy
from strategies.means import weights
from tests.conftest import Compose
from tests.fedlora.helpers import assert_same, random_state, request

RANKS = (4, 2, 1, 3)
EXAMPLES = (50, 3, 20, 7)
RECTANGULAR = "adapter.target_modules=[query,intermediate.dense,output.dense]"
MIXED = ["adapter.rank=4", "adapter.alpha=6", "adapter.client_ranks=[4,2,1,3]", RECTANGULAR]


def mixed(tiny: Compose, *more: str) -> Federation:
    return Federation(tiny("method=flora", *MIXED, *more))


def replies(federation: Federation) -> list[Reply]:
    model = federation.build_meta_model()
    shares = weights(EXAMPLES, "examples")
    result = []
    for i, (rank, count, share) in enumerate(zip(RANKS, EXAMPLES, shares, strict=True)):
        shapes = model.layout(rank)
        generator = torch.Generator().manual_seed(i)
        state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        result.append(Reply(f"client {i}", state, count, share, 0.5))
    return result


def test_ranks_go_round_the_sorted_clients(tiny: Compose) -> None:
    federation = mixed(tiny)
    found = [federation.capability(client).rank for client in sorted(federation.clients)]
    assert found == [RANKS[i % 4] for i in range(len(found))]
    assert federation.capability("central").rank is None
    assert Federation(tiny("method=flora")).capability(federation.clients[0]).rank is None


def test_a_layout_holds_the_leading_components_only(tiny: Compose) -> None:
    model = mixed(tiny).build_meta_model()
    full, small = model.layout(None), model.layout(2)
    assert list(full) == list(small) == list(model.shared)
    for key, shape in full.items():
        expected = {"lora_A": (2, shape[-1]), "lora_B": (shape[0], 2)}.get(key.split(".")[-2], shape)
        assert small[key] == expected


def test_crop_undoes_pad_and_the_rest_is_zero(tiny: Compose) -> None:
    model = mixed(tiny).build_meta_model()
    small = {key: torch.randn(shape) for key, shape in model.layout(2).items()}
    padded = pad(small, model.layout(None))
    assert_same(crop(padded, model.layout(2)), small)
    assert sum(int(value.count_nonzero()) for value in padded.values()) == sum(v.numel() for v in small.values())


def test_flora_is_exact_for_mixed_ranks_and_unequal_weights(tiny: Compose) -> None:
    federation = mixed(tiny)
    model, strategy = federation.build_model(), FLoRA()
    strategy.prepare(model)
    state = model.read(model.shared)
    answered = replies(federation)
    for reply in answered:
        strategy.send(reply.client, 1, state)
    folded = strategy.fold(1, state, answered)
    expected = weighted_mean([model.delta(reply.state) for reply in answered], [float(n) for n in EXAMPLES])
    actual = model.delta(folded)
    assert all(not delta.dense().any() for delta in actual.values())
    total = {module: actual[module] + residual for module, residual in strategy.residual().items()}
    assert relative_distance(expected, total) <= 1e-6
    assert {residual.rank for residual in strategy.residual().values()} == {sum(RANKS)}


def test_flexlora_is_the_best_approximation_and_a_client_gets_its_leading_part(tiny: Compose) -> None:
    federation = mixed(tiny)
    model, strategy = federation.build_model(), FlexLoRA()
    strategy.prepare(model)
    state = model.read(model.shared)
    answered = replies(federation)
    folded = strategy.fold(1, state, answered)
    expected = weighted_mean([model.delta(reply.state) for reply in answered], [float(n) for n in EXAMPLES])
    assert relative_distance(expected, model.delta(folded)) > 0.05
    for module, delta in model.delta(folded).items():
        best = expected[module].truncate(4)
        torch.testing.assert_close(delta.dense(), best.dense(), rtol=1e-4, atol=1e-4)
        for rank in (1, 2, 3):
            part = model.delta(crop(folded, model.layout(rank)))[module]
            torch.testing.assert_close(part.dense(), expected[module].truncate(rank).dense(), rtol=1e-4, atol=1e-4)


def test_flexlora_leaves_no_component_that_cannot_learn(tiny: Compose) -> None:
    federation = mixed(tiny)
    model, strategy = federation.build_model(), FlexLoRA()
    strategy.prepare(model)
    small = replies(federation)[2]  # alone, rank 1
    reply = Reply(small.client, small.state, small.examples, 1.0, 0.5)
    folded = strategy.fold(1, model.read(model.shared), [reply])
    assert relative_distance(model.delta(small.state), model.delta(folded)) < 1e-5
    for module in model.layers:
        assert (folded[f"{module}.lora_A.weight"].norm(dim=1) > 0.1).all()


@pytest.mark.parametrize(
    "settings", [[], ["client.weight_decay=0.1", "client.max_grad_norm=0.1"], ["client.optimizer=sgd"]], ids=str
)
def test_a_padded_client_trains_like_one_of_truly_smaller_rank(
    tiny: Compose, tmp_path: Path, settings: list[str]
) -> None:
    """Zero components get no gradient, so padding changes nothing but rounding."""
    common = ["method=flexlora", RECTANGULAR, "client.local_steps=6", *settings]
    padded = Federation(tiny(*common, "adapter.rank=4", "adapter.alpha=6", "adapter.client_ranks=[2]"))
    true = Federation(tiny(*common, "adapter.rank=2", "adapter.alpha=3"))
    client = padded.clients[0]
    answers = []
    state = random_state(true.build_model(), true.build_meta_model().shared)
    for federation, name in ((padded, "padded"), (true, "true")):
        worker = Worker(federation, ClientStore(tmp_path / name))
        message = request(1, wire.pack(state), **{"client-id": client})
        reply = worker.handle(message)
        answers.append(wire.unpack(reply.content.array_records["arrays"], worker.layout(client)))
        if name == "padded":
            whole = worker.model.read(worker.model.shared)
            assert_same(pad(crop(whole, worker.layout(client)), worker.model.layout()), whole)
    for key, value in answers[0].items():
        torch.testing.assert_close(value, answers[1][key], rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, state[key])


def restarted(worker: Worker, client: str, server_round: int) -> State:
    """The factors that a client starts a round of FLoRA from."""
    content = RecordDict({"config": ConfigRecord({"server-round": server_round, "client-id": client, "restart": True})})
    content["arrays"] = wire.pack({key: worker.initial[key] for key in worker.model.head})
    seen: list[State] = []
    train = worker.trainer.train
    worker.trainer.train = lambda members: (seen.append(dict(members[0].state)), train(members))[1]  # type: ignore[method-assign]
    message = request(1)
    message.content = content
    worker.handle(message)
    worker.trainer.train = train  # type: ignore[method-assign]
    return seen[0]


def test_a_restart_draws_new_factors_from_seed_round_and_client(tiny: Compose, tmp_path: Path) -> None:
    federation = mixed(tiny)
    worker = Worker(federation, ClientStore(tmp_path))
    a, b = federation.clients[1], federation.clients[5]  # both of rank 2
    first = restarted(worker, a, 1)
    others = [restarted(worker, a, 2), restarted(worker, b, 1)]
    assert_same(restarted(worker, a, 1), first)
    for key, value in first.items():
        if "lora_B" in key:
            assert not value.any()
        elif "lora_A" in key:
            assert (value[:2] != 0).all()
            assert not value[2:].any()
            assert not any(torch.equal(value, other[key]) for other in others)


@pytest.mark.parametrize("method", ["flora", "flexlora"])
@pytest.mark.parametrize("head", ["shared", "private"])
def test_only_the_components_of_a_client_travel_and_the_plan_knows(
    tiny: Compose, tmp_path: Path, method: str, head: str
) -> None:
    config = tiny(f"method={method}", *MIXED, f"adapter.head={head}", "cohort.size=null", "rounds=2")
    planned = plan_run(config)
    summary = start(config, tmp_path / "run")
    federation = Federation(config)
    model = federation.build_meta_model()
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    asked = 2 * len(federation.clients)  # announcements come first
    assert not ledger[:asked].payload.any()
    rest = ledger[asked:]
    first = rest[rest["round"] == 1]
    for client, rows in first[first.direction == "up"].groupby("client"):
        layout = model.layout(federation.capability(str(client)).rank)
        assert set(rows.payload) == {4 * sum(prod(shape) for shape in layout.values())}
    first = first[first.direction == "down"]
    if method == "flora":  # fresh factors come from the seed
        assert set(first.payload) == {4 * (66 if head == "shared" else 0)}
        assert summary["aggregation_error"]["max"] <= 1e-6
    else:
        assert len(set(first.payload)) == 4
        assert summary["aggregation_error"]["max"] > 1e-3
    for key in ("payload_up", "payload_down"):
        assert summary["totals"][key] == planned[key]
    for key in ("message_up", "message_down", "transport_up", "transport_down"):
        assert summary["totals"][key] == pytest.approx(planned[key], rel=1e-3)
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert not any(record["failures"] for record in records)


@pytest.mark.parametrize("strategy", ["fedit", "fedex", "custom strategy._target_=flwr.serverapp.strategy.FedAvg"])
def test_other_strategies_refuse_mixed_ranks_and_name_those_that_do_not(tiny: Compose, strategy: str) -> None:
    config = tiny("adapter.client_ranks=[4,2]", *f"strategy={strategy}".split())
    model = Federation(config).build_meta_model()
    with pytest.raises(InputError, match=r"adapter\.client_ranks.*strategy=flora \(exact\) or strategy=flexlora"):
        build_strategy(config.strategy, model)


@pytest.mark.parametrize("method", ["local", "central"])
def test_baselines_run_with_mixed_ranks(tiny: Compose, tmp_path: Path, method: str) -> None:
    summary = start(tiny(f"method={method}", "adapter.client_ranks=[4,2]", "rounds=2"), tmp_path / "run")
    assert summary["label"] == f"{method}[r=2..4]"


@pytest.mark.parametrize(
    ("ranks", "message"),
    [("[8,2]", r"client_ranks holds 8.*adapter\.rank=8"), ("[0]", "client_ranks"), ("[]", "client_ranks")],
)
def test_ranks_that_cannot_be_are_refused(tiny: Compose, ranks: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Federation(tiny("method=flora", f"adapter.client_ranks={ranks}"))
