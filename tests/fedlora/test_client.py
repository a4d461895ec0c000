from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedlora import wire
from fedlora.adapters import State
from fedlora.client import Worker, client_app, instruct, worker_for
from fedlora.correction import CorrectionLog
from fedlora.errors import FedloraError
from fedlora.federation import Federation
from fedlora.grid import node_of
from fedlora.lowrank import LowRank
from fedlora.store import ClientRecord, ClientStore
from tests.fedlora.helpers import ADAPTERS, assert_same, first_batch, logits, random_state, request, started


def make_worker(config, folder: Path) -> Worker:
    return Worker(Federation(config), ClientStore(folder))


def message_to(
    worker: Worker, client: str, server_round: int = 1, state: State | None = None, **more: object
) -> Message:
    """A message as it arrives at the client: packed, and naming it."""
    state = worker.model.read(worker.model.shared) if state is None else state
    message = request(node_of(client), wire.pack(state, worker.federation.config.wire.dtype) if state else None)
    message.content["config"] = instruct(client, server_round, **more)
    return message


def returned(worker: Worker, reply: Message) -> State:
    layout = worker.model.shapes(worker.model.shared)
    return wire.unpack(reply.content.array_records["arrays"], layout, worker.federation.config.wire.dtype)


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_handling_a_message_twice_gives_the_same_bits(tiny, tmp_path: Path, adapter: str):
    worker = make_worker(tiny(*ADAPTERS[adapter], "adapter.head=private"), tmp_path / "one")
    client, other = worker.federation.clients[:2]
    setup = wire.pack(started(worker.federation).read(worker.model.frozen)) if "gradient" in adapter else None
    state = random_state(worker.model, worker.model.shared)

    def handle(worker: Worker, client: str) -> tuple[State, State, object]:
        message = message_to(worker, client, 2, state)
        if setup is not None:
            message.content["setup"] = setup
        reply = worker.handle(message)
        metrics = dict(reply.content.metric_records["metrics"])
        return returned(worker, reply), dict(worker.store.read(client, 3).private), metrics

    first = handle(worker, client)
    handle(worker, other)  # whoever was trained in between must not matter
    torch.randn(7)
    for again in (handle(worker, client), handle(make_worker(worker.federation.config, tmp_path / "two"), client)):
        assert_same(again[0], first[0])
        assert_same(again[1], first[1])
        assert again[2] == first[2]
    assert any(not torch.equal(first[0][key], value) for key, value in state.items())


def load_personal(worker: Worker, client: str, before_round: int) -> None:
    state, frozen = worker.personal(client, before_round)
    worker.trainer.hold(frozen)
    worker.model.load(state)


def order_seen(worker: Worker, clients: tuple[str, ...], server_round: int, stream: str) -> list[list[int]]:
    """The rows of token ids in the order in which they reach the model."""
    seen: list[list[int]] = []

    def record(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(ids[mask == 1].tolist())

    member = worker.member(worker.model.read(worker.model.trainable), clients, server_round, stream)
    trainer = worker.trainer  # before the hook: choosing how to train runs the model on a few rows
    hook = worker.model.module.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train([member])
    hook.remove()
    return seen


def test_batches_depend_on_seed_round_and_client_only(tiny, tmp_path: Path):
    config = tiny()
    worker = make_worker(config, tmp_path)
    clients = worker.federation.clients[:3]
    base = order_seen(worker, clients, 1, "x")
    torch.randn(3)
    worker.model.load(random_state(worker.model, worker.model.shared))
    assert order_seen(worker, clients, 1, "x") == base
    others = [order_seen(worker, clients, 2, "x"), order_seen(worker, clients, 1, "y")]
    worker.federation.config = config.model_copy(update={"seed": 99})  # the same rows, another seed for their order
    others.append(order_seen(worker, clients, 1, "x"))
    for other in others:
        assert other != base
        assert sorted(other) == sorted(base)


def test_a_reply_names_its_examples_and_its_mean_loss(tiny, tmp_path: Path):
    worker = make_worker(tiny("client.lr=1e-12"), tmp_path)
    client = worker.federation.clients[0]
    reply = worker.handle(message_to(worker, client))
    metrics = reply.content.metric_records["metrics"]
    rows = worker.federation.index.train[client]
    assert metrics["num-examples"] == len(rows)
    assert metrics["train_loss"] == pytest.approx(math.log(2), rel=0.3)
    assert reply.metadata.src_node_id == node_of(client)


def test_training_on_a_clients_rows_lowers_its_loss(tiny, tmp_path: Path):
    worker = make_worker(tiny("client.local_epochs=12"), tmp_path)
    client = worker.federation.clients[0]
    losses = []
    state = None
    for server_round in range(1, 4):
        reply = worker.handle(message_to(worker, client, server_round, state))
        state = returned(worker, reply)
        losses.append(reply.content.metric_records["metrics"]["train_loss"])
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_client_speaks_the_wire_type(tiny, tmp_path: Path, dtype: str):
    worker = make_worker(tiny(f"wire.dtype={dtype}"), tmp_path)
    reply = worker.handle(message_to(worker, worker.federation.clients[0]))
    numbers = sum(math.prod(shape) for shape in worker.model.shapes(worker.model.shared).values())
    assert wire.tensor_bytes(reply.content.array_records["arrays"]) == 2 * numbers


def test_a_pool_is_trained_on_the_rows_of_all_its_clients(tiny, tmp_path: Path):
    worker = make_worker(tiny(), tmp_path)
    clients = worker.federation.clients[:3]
    reply = worker.handle(message_to(worker, "pool", pool=list(clients)))
    expected = sum(len(worker.federation.index.train[client]) for client in clients)
    assert reply.content.metric_records["metrics"]["num-examples"] == expected


@pytest.mark.parametrize("instruction", ["proximal-mu", "learning-rate"])
def test_an_instruction_that_a_client_does_not_know_is_refused(tiny, tmp_path: Path, instruction: str):
    worker = make_worker(tiny(), tmp_path)
    with pytest.raises(FedloraError, match=instruction):
        worker.handle(message_to(worker, worker.federation.clients[0], **{instruction: 0.1}))


def test_arrays_that_do_not_fit_are_refused(tiny, tmp_path: Path):
    worker = make_worker(tiny(), tmp_path)
    with pytest.raises(FedloraError, match="bytes"):
        worker.handle(message_to(worker, worker.federation.clients[0], state={"x": torch.zeros(3)}))


def test_a_loss_that_is_not_finite_names_client_round_and_setting(tiny, tmp_path: Path):
    worker = make_worker(tiny("client.lr=1e30", "client.optimizer=sgd", "client.local_steps=20"), tmp_path)
    client = worker.federation.clients[0]
    with pytest.raises(FedloraError, match=rf"client '{client}' in round 3.*client\.lr \(now 1e\+30\)"):
        worker.handle(message_to(worker, client, 3))


# What a client keeps ----------------------------------------------------------------------------------------------


def test_a_private_head_stays_with_its_client(tiny, tmp_path: Path):
    config = tiny("adapter.head=private")
    worker = make_worker(config, tmp_path)
    client, other = worker.federation.clients[:2]
    assert not set(worker.model.head) & set(worker.model.shared)
    first = worker.handle(message_to(worker, client, 1))
    assert set(first.content.array_records) == {"arrays"}
    assert set(returned(worker, first)) == set(worker.model.shared)
    own = worker.store.read(client, 2).private
    assert set(own) == set(worker.model.head)
    assert any(not torch.equal(own[key], worker.initial[key]) for key in own)

    load_personal(worker, other, 2)
    assert_same(worker.model.read(worker.model.head), {key: worker.initial[key] for key in worker.model.head})
    again = make_worker(config, tmp_path)  # another process, later
    load_personal(again, client, 2)
    assert_same(again.model.read(again.model.head), {key: own[key] for key in again.model.head})


def test_a_private_head_is_where_the_next_round_starts(tiny, tmp_path: Path):
    worker = make_worker(tiny("adapter.head=private", "client.lr=1e-12"), tmp_path)
    client = worker.federation.clients[0]
    head = random_state(worker.model, worker.model.head)
    worker.store.write(client, 4, ClientRecord(head))
    worker.handle(message_to(worker, client, 5))
    kept = worker.store.read(client, 6).private
    for key, value in head.items():
        torch.testing.assert_close(kept[key], value)


def test_a_client_without_private_state_leaves_no_files(tiny, tmp_path: Path):
    worker = make_worker(tiny(), tmp_path)
    worker.handle(message_to(worker, worker.federation.clients[0]))
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_personal_client_keeps_all_and_sends_no_tensors(tiny, tmp_path: Path):
    worker = make_worker(tiny("method=local"), tmp_path)
    client, other = worker.federation.clients[:2]
    for server_round in (1, 2):
        reply = worker.handle(message_to(worker, client, server_round, {}, personal=True))
        assert list(reply.content) == ["metrics"]
    kept = worker.store.read(client, 3).private
    assert set(kept) == set(worker.model.trainable)
    worker.handle(message_to(worker, other, 2, {}, personal=True))
    load_personal(worker, client, 3)
    assert_same(worker.model.read(worker.model.trainable), {key: kept[key] for key in worker.model.trainable})


def test_a_client_without_the_basis_says_so(tiny, tmp_path: Path):
    worker = make_worker(tiny("method=fed_sb"), tmp_path)
    with pytest.raises(FedloraError, match="basis never reached"):
        worker.handle(message_to(worker, worker.federation.clients[0]))


def test_a_basis_is_kept_after_it_was_received_once(tiny, tmp_path: Path):
    config = tiny("method=fed_sb")
    worker = make_worker(config, tmp_path)
    client, other = worker.federation.clients[:2]
    server = started(worker.federation)
    frozen, state = server.read(server.frozen), server.read(server.shared)
    for name in (client, other):
        message = message_to(worker, name, 1, state)
        message.content["setup"] = wire.pack(frozen)
        worker.handle(message)
    assert len(list((tmp_path / "_shared").iterdir())) == 1  # stored once for all
    later = make_worker(config, tmp_path)
    reply = later.handle(message_to(later, client, 2, state))
    assert_same(later.model.read(later.model.frozen), frozen)
    assert any(not torch.equal(value, state[key]) for key, value in returned(later, reply).items())
    with pytest.raises(FedloraError, match="basis never reached"):
        later.handle(message_to(later, worker.federation.clients[2], 2, state))


def corrected(worker: Worker, log: CorrectionLog, since: int | None, client: str, server_round: int) -> Message:
    update = log.update_since(since)
    assert update is not None
    message = message_to(worker, client, server_round, correction=update.header())
    message.content["correction"] = wire.pack(update.tensors())
    return message


def grow(log: CorrectionLog, worker: Worker, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log.append(
        {
            name: LowRank(
                torch.randn(x.out_features, 2, generator=generator), torch.randn(2, x.in_features, generator=generator)
            )
            for name, x in worker.model.layers.items()
        }
    )


def held(worker: Worker, client: str, before_round: int) -> State:
    return worker.store.get_shared(worker.store.read(client, before_round).references["correction"])


def test_a_client_adds_up_the_base_corrections_it_receives(tiny, tmp_path: Path):
    worker = make_worker(tiny("method=fedex"), tmp_path)
    client, late = worker.federation.clients[:2]
    log = CorrectionLog()
    for server_round in (1, 2):
        grow(log, worker, server_round)
        worker.handle(corrected(worker, log, server_round - 1, client, server_round))
    worker.handle(corrected(worker, log, None, late, 2))
    for name in (client, late):
        for module, total in log.total.items():
            torch.testing.assert_close(held(worker, name, 3)[module], total)


def test_a_base_correction_changes_what_a_client_learns(tiny, tmp_path: Path):
    worker = make_worker(tiny("method=fedex"), tmp_path)
    client = worker.federation.clients[0]
    log = CorrectionLog()
    grow(log, worker, 1)
    state = random_state(worker.model, worker.model.shared)
    plain = returned(worker, worker.handle(message_to(worker, client, 1, state)))
    message = corrected(worker, log, 0, client, 1)
    message.content["arrays"] = wire.pack(state)
    changed = returned(worker, worker.handle(message))
    assert any(not torch.equal(plain[key], changed[key]) for key in plain)
    message = message_to(worker, client, 1, state)
    other = make_worker(worker.federation.config, tmp_path / "other")
    assert_same(returned(worker, worker.handle(message)), returned(other, other.handle(message)))  # nothing left behind


def test_a_base_correction_for_another_base_is_refused(tiny, tmp_path: Path):
    worker = make_worker(tiny("method=fedex"), tmp_path)
    client = worker.federation.clients[0]
    log = CorrectionLog()
    grow(log, worker, 1)
    grow(log, worker, 2)
    with pytest.raises(FedloraError, match="base correction 1 expected, but this client holds 0"):
        worker.handle(corrected(worker, log, 1, client, 2))


def test_a_round_that_is_run_again_corrects_the_base_once(tiny, tmp_path: Path):
    worker = make_worker(tiny("method=fedex"), tmp_path)
    client = worker.federation.clients[0]
    log = CorrectionLog()
    grow(log, worker, 1)
    for _ in range(2):
        worker.handle(corrected(worker, log, 0, client, 1))
    for module, total in log.total.items():
        torch.testing.assert_close(held(worker, client, 2)[module], total)


def test_a_worker_can_be_put_back_to_its_start(tiny, tmp_path: Path):
    worker = make_worker(tiny("method=fed_sb", "adapter.basis=weight"), tmp_path)
    batch = first_batch(worker.federation)
    before = logits(worker.model.module, batch)
    worker.model.load(random_state(worker.model, (*worker.model.trainable, *worker.model.frozen)))
    worker.model.set_base_correction({name: torch.ones(32, 32) for name in worker.model.layers})
    assert not torch.equal(logits(worker.model.module, batch), before)
    worker.reset()
    assert torch.equal(logits(worker.model.module, batch), before)


def context() -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def test_a_client_that_fails_answers_why(tiny, tmp_path: Path):
    config = tiny()
    worker = make_worker(config, tmp_path / "worker")
    message = message_to(worker, worker.federation.clients[0], **{"proximal-mu": 0.1})
    reply = client_app(lambda: worker)(message, context())
    assert reply.has_error()
    assert "proximal-mu" in reply.error.reason
    assert reply.metadata.src_node_id == message.metadata.dst_node_id


def test_the_client_app_is_the_worker(tiny, tmp_path: Path):
    config = tiny()
    worker = make_worker(config, tmp_path / "worker")
    client = worker.federation.clients[0]
    state = random_state(worker.model, worker.model.shared)
    app = client_app(partial(worker_for, config.model_dump_json(), str(tmp_path / "app")))
    reply = app(message_to(worker, client, 1, state), context())
    expected = worker.handle(message_to(worker, client, 1, state))
    assert_same(returned(worker, reply), returned(worker, expected))
