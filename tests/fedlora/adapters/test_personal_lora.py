"""Promises of personal LoRA: two parts trained in turn, one of which never leaves its client and the other is exact."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from fedlora import wire
from fedlora.adapters import State
from fedlora.adapters.base import ADAPTER_NAME, Phase
from fedlora.adapters.personal_lora import PRIVATE_A, PRIVATE_B, PersonalLora
from fedlora.client import Worker
from fedlora.cohort import Member
from fedlora.errors import InputError
from fedlora.export import export_adapter
from fedlora.federation import Federation
from fedlora.model import AdaptedModel, part_of
from fedlora.store import ClientStore
from fedlora.training import batch_order
from simulations.plan import plan_run
from simulations.simulate import start
from strategies.build import build_strategy
from tests.conftest import Compose
from tests.fedlora.helpers import (
    FACTORS,
    SCALES,
    TARGETS,
    assert_same,
    bare_backbone,
    first_batch,
    logits,
    of_architecture,
    random_state,
    request,
)

# PEFT's own loader still asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SPLIT = ["method=split", "adapter.private_rank=2"]
FREE = ["method=personal_lora", "adapter.private_rank=3"]
BOTH = pytest.mark.parametrize("plan", [FREE, SPLIT], ids=["free", "split"])
ROUNDING = 1e-6


@pytest.fixture(params=TARGETS)
def architecture(request: pytest.FixtureRequest) -> list[str]:
    """Linear layers with m != n, and GPT-2's transposed Conv1D."""
    return of_architecture(request.param, request.getfixturevalue(request.param))


def of_client(model: AdaptedModel, client: str, seed: int = 0) -> State:
    """All factors of a client far from their start: its rows, and random numbers for what is trained."""
    trained = random_state(model, [key for key in model.trainable if key not in model.head], seed)
    return {**model.read(model.frozen), **model.own_of(client), **trained}


def without_shared(state: State) -> State:
    return {key: torch.zeros_like(value) if part_of(key) == "lora_B" else value for key, value in state.items()}


def member_of(worker: Worker, client: str) -> Member:
    """A client far from the start, so that every trained tensor has a gradient."""
    state = {**worker.start_of(client), **random_state(worker.model, worker.model.trainable)}
    return worker.member(state, [client], 1, client)


@BOTH
@pytest.mark.parametrize("scale", SCALES)
def test_a_layer_adds_what_is_shared_and_what_is_private(
    tiny: Compose, architecture: list[str], plan: list[str], scale: str
) -> None:
    federation = Federation(tiny(*plan, *architecture, *SCALES[scale]))
    model = federation.build_model()
    state = of_client(model, federation.clients[1])
    model.load(state)
    whole = model.adapter.delta(state)
    shared = model.delta({key: state[key] for key in model.shared if key not in model.head})
    assert whole is not None
    for name, layer in model.layers.items():
        b, a, own_b, own_a = (state[f"{name}.{f}.weight"].double() for f in ("lora_B", "lora_A", PRIVATE_B, PRIVATE_A))
        parts = FACTORS[scale] * b @ a, FACTORS[scale] * own_b @ own_a
        assert min(part.norm() for part in parts) > 0.1
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))  # type: ignore
        with torch.no_grad():
            change = layer(x) - layer.get_base_layer()(x)  # type: ignore[operator]
        torch.testing.assert_close(change.double(), x.double() @ sum(parts).T, rtol=1e-4, atol=1e-5)  # type: ignore
        torch.testing.assert_close(whole[name].dense().double(), sum(parts), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shared[name].dense().double(), parts[0], rtol=1e-5, atol=1e-6)
        merged = layer.get_delta_weight(ADAPTER_NAME).detach().double()  # type: ignore[operator]
        oriented = merged.T if isinstance(layer.get_base_layer(), Conv1D) else merged
        torch.testing.assert_close(oriented, sum(parts), rtol=1e-5, atol=1e-6)


@BOTH
def test_a_client_starts_as_the_backbone(tiny: Compose, tmp_path: Path, plan: list[str]) -> None:
    worker = Worker(Federation(tiny(*plan)), ClientStore(tmp_path))
    batch = first_batch(worker.federation)
    worker.model.load(worker.start_of(worker.federation.clients[2]))
    assert torch.equal(logits(worker.model.module, batch), logits(bare_backbone(worker.federation), batch))


def test_shared_and_private_rows_are_orthonormal_and_no_update_touches_another(
    tiny: Compose, architecture: list[str]
) -> None:
    federation = Federation(tiny(*SPLIT, *architecture))
    model, clients = federation.build_model(), federation.clients
    states = [of_client(model, client, seed) for seed, client in enumerate(clients)]
    common = model.delta({key: value for key, value in states[0].items() if part_of(key) == "lora_B"})
    own = [model.adapter.delta(without_shared(state)) for state in states]
    for name in model.layers:
        rows = [states[0][f"{name}.lora_A.weight"], *(state[f"{name}.{PRIVATE_A}.weight"] for state in states)]
        stack = torch.cat(rows)
        assert stack.shape[0] == 4 + 2 * len(clients)
        assert (stack @ stack.T - torch.eye(len(stack))).norm() <= ROUNDING
        updates = [common[name], *(each[name] for each in own[:3] if each is not None)]
        assert min(update.norm() for update in updates) > 0.1
        for i, update in enumerate(updates):
            for other in updates[:i]:
                assert abs(update.inner(other)) <= ROUNDING * update.norm() * other.norm()


def test_shared_rows_do_not_depend_on_the_private_part(tiny: Compose) -> None:
    found = [Federation(tiny(*plan)).build_model() for plan in (FREE, SPLIT, ["method=orthogonal"])]
    rows = [{key: value for key, value in m.read(m.frozen).items() if ".lora_A." in key} for m in found]
    assert_same(rows[0], rows[1])
    assert_same(rows[0], rows[2])


@BOTH
@pytest.mark.parametrize("head", ["shared", "private"])
@pytest.mark.parametrize("engine", ["loop", "cohort"])
def test_each_phase_leaves_the_other_part_as_it_was_to_the_bit(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: list[str], head: str, engine: str
) -> None:
    worker = Worker(Federation(tiny(*plan, f"adapter.head={head}")), ClientStore(tmp_path))
    if engine == "cohort":
        assert worker.share_steps() is None
    members = [member_of(worker, client) for client in worker.federation.clients[:3]]
    private, shared = worker.model.private, worker.model.shared
    assert {part_of(key) for key in shared if key not in worker.model.head} == {"lora_B"}
    assert set(worker.model.head) <= set(private if head == "private" else shared)
    for phase, moves in ((Phase("private"), private), (Phase("shared"), shared)):
        monkeypatch.setattr(PersonalLora, "phases", lambda self, phase=phase: (phase,))
        for member, trained in zip(members, worker.trainer.train(members), strict=True):
            assert set(trained.state) == {*private, *shared}
            for key, value in trained.state.items():
                assert torch.equal(value, member.state[key]) != (key in moves), (phase.trains, key)


@BOTH
def test_a_round_is_two_passes_over_the_same_batches(tiny: Compose, tmp_path: Path, plan: list[str]) -> None:
    worker = Worker(Federation(tiny(*plan, "client.local_epochs=2")), ClientStore(tmp_path))
    federation, model = worker.federation, worker.model
    member = member_of(worker, federation.clients[0])
    trained = worker.trainer.train([member])[0]
    model.load(member.state)
    settings, losses = federation.config.client, []
    for keys in (model.private, model.shared):
        model.own_trainables(keys)
        optimizer = torch.optim.AdamW(model.parameters(keys), lr=settings.lr, weight_decay=0.0)
        for rows in batch_order(member.rows, settings.batch_size, settings.local_epochs, None, member.rng()):
            optimizer.zero_grad()
            loss = federation.task.loss(model.module, federation.task.collate(federation.rows, rows))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    for key, value in model.read(model.trainable).items():
        torch.testing.assert_close(trained.state[key], value, atol=1e-6, rtol=1e-5)
    assert trained.loss == pytest.approx(sum(losses[: len(losses) // 2]) / (len(losses) // 2), rel=1e-5)


def test_at_once_is_one_pass_and_half_the_work(tiny: Compose, tmp_path: Path) -> None:
    at_once, in_turn = (tiny(*FREE, f"adapter.alternate={value}") for value in ("false", "true"))
    assert plan_run(in_turn)["client_flops_per_round"] == 2 * plan_run(at_once)["client_flops_per_round"]
    worker = Worker(Federation(at_once), ClientStore(tmp_path))
    member = member_of(worker, worker.federation.clients[0])
    trained = worker.trainer.train([member])[0]
    assert all(not torch.equal(value, member.state[key]) for key, value in trained.state.items())
    assert worker.federation.adapter.label == "personal_lora[free][at once]"


@BOTH
def test_private_factors_never_travel_and_go_on_where_they_were(tiny: Compose, tmp_path: Path, plan: list[str]) -> None:
    config = tiny(*plan, "cohort.size=null", "rounds=2", "checkpoint.every=0", "client.keep_optimizer=true")
    summary = start(config, tmp_path / "run")
    worker = Worker(Federation(config), ClientStore(tmp_path / "run" / "clients"))
    model = worker.model
    shared = sum(prod(shape) for shape in model.shapes(model.shared).values())
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    assert set(ledger.payload) == {4 * shared}
    assert summary["totals"]["setup_bytes"] == 0
    assert summary["aggregation_error"]["max"] <= 1e-6
    assert set(load_file(tmp_path / "run" / "shared.safetensors")) == set(model.shared)
    state = load_file(tmp_path / "run" / "shared.safetensors")
    for client in worker.federation.clients:
        first, second = (worker.store.read(client, before) for before in (2, 3))
        assert set(first.private) == set(second.private) == set(model.private)
        assert {key.rpartition("/")[0] for key in second.optimizer} == set(model.trainable)
        assert all(not torch.equal(second.private[key], value) for key, value in first.private.items())
        again = request(1, wire.pack(state), **{"client-id": client, "server-round": 3})
        job = worker.open(again)
        assert_same({key: job.member.state[key] for key in second.private}, second.private)
        reply = worker.close(job, worker.trainer.train([job.member])[0])
        assert set(reply.content.array_records) == {"arrays"}
        assert len(reply.content.array_records["arrays"][wire.PACKED].data) <= 4 * shared + 256


@BOTH
def test_private_ranks_may_differ_and_travel_for_nobody(tiny: Compose, tmp_path: Path, plan: list[str]) -> None:
    config = tiny(*plan, "adapter.private_rank=[2,1]", "cohort.size=null", "rounds=2")
    planned, summary = plan_run(config), start(config, tmp_path / "run")
    assert summary["label"].endswith("[r=1..2]")
    for key in ("payload_up", "payload_down", "setup_bytes"):
        assert summary["totals"][key] == planned[key]
    assert summary["aggregation_error"]["max"] <= 1e-6
    worker = Worker(Federation(config), ClientStore(tmp_path / "run" / "clients"))
    assert {str(worker.layout(client)) for client in worker.federation.clients} == {str(worker.model.layout())}
    for position, client in enumerate(worker.federation.clients):
        private, rank = worker.store.read(client, 3).private, (2, 1)[position % 2]
        for key in private.keys() - set(worker.model.head):
            components = private[key] if part_of(key) == PRIVATE_A else private[key].T
            assert (components[:rank].norm(dim=1) > 0).all()
            assert not components[rank:].any()


@BOTH
def test_a_clients_model_is_saved_as_lora_of_both_ranks(tiny: Compose, tmp_path: Path, plan: list[str]) -> None:
    federation = Federation(tiny(*plan))
    model, batch = federation.build_model(), first_batch(federation)
    state = of_client(model, federation.clients[1])
    model.load(state)
    export_adapter(federation, tmp_path, state, {}, {}, model.read(model.head))
    loaded = PeftModel.from_pretrained(bare_backbone(federation), str(tmp_path)).eval()
    assert loaded.peft_config["default"].r == 4 + (3 if plan is FREE else 2)  # type: ignore[union-attr]
    torch.testing.assert_close(logits(loaded, batch), logits(model.module, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", [FREE, SPLIT, ["adapter=fedsa"]], ids=["free", "split", "fedsa"])
@pytest.mark.parametrize(
    "strategy",
    ["average", "fedit", "fedsvd", "central", "disjoint", "strategy._target_=flwr.serverapp.strategy.FedAvg"],
)
def test_strategies_that_leave_one_model_are_refused(tiny: Compose, plan: list[str], strategy: str) -> None:
    config = tiny(*plan, strategy if "=" in strategy else f"strategy={strategy}")
    with pytest.raises(
        InputError, match=r"(fedsa|personal_lora\[\w+\]) keeps tensors at every client, such as .*'fedlora methods'"
    ):
        build_strategy(config.strategy, Federation(config).build_meta_model())


@pytest.mark.parametrize("adapter", ["lora", "orthogonal", "fedsa"])
def test_the_strategy_needs_a_private_part(tiny: Compose, adapter: str) -> None:
    config = tiny(f"adapter={adapter}", "strategy=personal_lora")
    with pytest.raises(InputError, match=r"strategy=personal_lora needs adapter=personal_lora"):
        build_strategy(config.strategy, Federation(config).build_meta_model())


@BOTH
def test_a_client_alone_may_have_both_parts(tiny: Compose, tmp_path: Path, plan: list[str]) -> None:
    summary = start(tiny(*plan, "strategy=local", "adapter.private_rank=[2,1]", "rounds=1"), tmp_path / "run")
    assert summary["final"]["metrics"]


def test_more_private_rows_than_a_layer_has_are_refused_with_the_numbers(tiny: Compose, tmp_path: Path) -> None:
    count = len(Federation(tiny("method=split")).clients)
    fits = (32 - 4) // count
    assert 4 + count * (fits + 1) > 32
    message = rf"rank = 4 shared.*= {fits + 1} of its own for each of {count} .*n = 32 .*private_rank <= {fits}.*free"
    with pytest.raises(InputError, match=message):
        start(tiny("method=split", f"adapter.private_rank={fits + 1}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Federation(tiny("method=split", f"adapter.private_rank={fits}")).build_meta_model()


@pytest.mark.parametrize(
    ("value", "message"),
    [("64", r"private_rank = 64 is larger than layer"), ("[0]", "private_rank"), ("[]", "private_rank")],
)
def test_private_ranks_that_cannot_be_are_refused(tiny: Compose, value: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Federation(tiny("method=personal_lora", f"adapter.private_rank={value}")).build_meta_model()
