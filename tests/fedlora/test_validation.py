"""What each rule refuses, one by one; tests/fedlora/test_hostile.py tries what nobody thought of."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from fedlora import validation, wire
from fedlora.client import Worker, instruct
from fedlora.errors import FedloraError
from fedlora.federation import Federation
from fedlora.grid import CodecGrid, error_reply, node_of, reason_of
from fedlora.protocol import CLIP, GRADIENTS, NOISE
from fedlora.store import ClientStore
from fedlora.validation import ReplyRules
from tests.fedlora.helpers import Engine, assert_same, request

LAYOUT: dict[str, tuple[int, ...]] = {"m.lora_B.weight": (3, 2), "m.lora_A.weight": (2, 5)}
STATE = {key: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for key, shape in LAYOUT.items()}


def answered(arrays: ArrayRecord | None = None, rules: ReplyRules = ReplyRules(), **metrics: object) -> Message:  # noqa: B008
    """What the server makes of the reply of a client that was sent ``STATE``."""
    said = MetricRecord({name.replace("_e", "-e"): value for name, value in metrics.items()})  # type: ignore[misc]
    record = wire.pack(STATE) if arrays is None else arrays
    engine = Engine(lambda message: Message(RecordDict({"arrays": record, "metrics": said}), reply_to=message))
    grid = CodecGrid(engine, lambda client: LAYOUT, lambda client, parts: LAYOUT, "fp32", rules)
    grid.begin_round(1, ["a"])
    (reply,) = grid.send_and_receive([request(node_of("a"), wire.to_record(STATE))])
    return reply


def refusal(reply: Message) -> str:
    assert reply.has_error()
    return reason_of(reply)


# Replies --------------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("stype", [wire.STYPE, "numpy.ndarray", "pickle", "torch"])
@pytest.mark.parametrize("stored", ["pickle", "object array"])
def test_an_array_whose_bytes_are_a_pickle_is_refused_and_nothing_is_executed(tmp_path: Path, stype: str, stored: str):
    fuse = tmp_path / "exploded"
    if stored == "pickle":
        data = pickle.dumps(Bomb(fuse))
    else:
        np.save(tmp_path / "bomb.npy", np.array([Bomb(fuse)], dtype=object), allow_pickle=True)
        data = (tmp_path / "bomb.npy").read_bytes()
    array = Array(dtype="float32", shape=(16,), stype=stype, data=data)
    reply = answered(ArrayRecord({wire.PACKED: array}), num_examples=1, train_loss=0.5)
    assert "refused reply: expected" in refusal(reply)
    assert not fuse.exists()
    if stype == "numpy.ndarray":
        with pytest.raises(ValueError, match="pickle"):  # Flower itself would not have loaded it either
            array.numpy()
    assert not fuse.exists()
    if stored == "pickle":
        pickle.loads(data)
        assert fuse.exists()  # it does work


def test_a_pickle_of_exactly_the_right_size_is_only_numbers(tmp_path: Path):
    fuse = tmp_path / "exploded"
    data = pickle.dumps(Bomb(fuse))
    data = data + bytes(-len(data) % 4)
    layout = {"x": (len(data) // 4,)}
    array = Array(dtype="float32", shape=layout["x"], stype=wire.STYPE, data=data)
    numbers = wire.numbers(ArrayRecord({wire.PACKED: array}), layout)
    assert numbers.numpy().tobytes() == data
    assert not fuse.exists()


def test_a_larger_number_of_examples_than_allowed_is_refused():
    rules = ReplyRules(max_examples=100)
    assert not answered(rules=rules, num_examples=100, train_loss=0.5).has_error()
    assert "not a positive integer of at most 100" in refusal(answered(rules=rules, num_examples=101, train_loss=0.5))
    assert "num-examples" in refusal(answered(num_examples=2**53 + 1, train_loss=0.5))


@pytest.mark.parametrize(("scale", "refused"), [(0.0, False), (0.99, False), (1.01, True), (-1.01, True), (1e18, True)])
def test_an_update_of_a_larger_norm_than_allowed_is_refused(scale: float, refused: bool):
    direction = {key: torch.ones_like(value) for key, value in STATE.items()}
    norm = math.sqrt(16)
    moved = {key: value + scale * direction[key] for key, value in STATE.items()}
    reply = answered(wire.pack(moved), ReplyRules(max_update_norm=norm), num_examples=1, train_loss=0.5)
    assert reply.has_error() == refused
    if refused:
        assert "cohort.max_update_norm = 4" in refusal(reply)
    assert not answered(wire.pack(moved), num_examples=1, train_loss=0.5).has_error()


def test_a_tensor_that_was_not_sent_counts_whole():
    rules = ReplyRules(max_update_norm=1.0)
    message = Message(RecordDict({"config": ConfigRecord()}), node_of("a"), MessageType.TRAIN)
    content = RecordDict(
        {
            "arrays": wire.pack({"x": torch.full((4,), 3.0)}),
            "metrics": MetricRecord({"num-examples": 1, "train_loss": 0.5}),
        }
    )
    reply = Message(content, reply_to=message)
    validation.trained(reply, rules, {"x": (4,)}, sent={"x": torch.full((4,), 3.4)})
    with pytest.raises(FedloraError, match="norm of its update is 6"):
        validation.trained(reply, rules, {"x": (4,)})


def test_the_state_that_a_norm_is_measured_from_does_not_outlive_the_round():
    grid = CodecGrid(
        Engine(), lambda client: LAYOUT, lambda client, parts: LAYOUT, "fp32", ReplyRules(max_update_norm=1.0)
    )
    grid.begin_round(1, ["a"])
    (reply,) = grid.send_and_receive([request(node_of("a"), wire.to_record(STATE))])
    assert_same(wire.from_record(reply.content.array_records["arrays"]), STATE)
    assert not grid._states


@pytest.mark.parametrize("epsilon", [math.nan, -0.1, math.inf, -math.inf, [1.0]])
def test_an_epsilon_that_nobody_can_have_spent_is_refused(epsilon: object):
    rules = ReplyRules(epsilons=True)
    assert not answered(rules=rules, num_examples=1, train_loss=0.5, epsilon=0.0).has_error()
    reply = answered(rules=rules, num_examples=1, train_loss=0.5, epsilon=epsilon)
    assert "epsilon is" in refusal(reply)


def test_without_noise_epsilon_is_infinite_and_that_is_no_lie():
    rules = ReplyRules(epsilons=True, unbounded_epsilon=True)
    assert not answered(rules=rules, num_examples=1, train_loss=0.5, epsilon=math.inf).has_error()
    assert answered(rules=rules, num_examples=1, train_loss=0.5, epsilon=math.nan).has_error()


@pytest.mark.parametrize("more", [{"accuracy": 0.5}, {"epsilon": 1.0}, {"x" * 10**6: [1.0] * 1000}])
def test_metrics_that_nobody_asked_for_are_refused(more: dict[str, object]):
    reason = refusal(answered(num_examples=1, train_loss=0.5, **more))
    assert "which nobody asked for" in reason
    assert len(reason) <= validation.MAX_REASON


def test_a_loss_that_should_stay_with_its_client_is_refused():
    rules = ReplyRules(losses=False)
    assert not answered(rules=rules, num_examples=1).has_error()
    assert "train_loss" in refusal(answered(rules=rules, num_examples=1, train_loss=0.5))


def test_the_rules_follow_the_configuration(tiny):
    private = ["privacy=record", "privacy.send_counts=false", "privacy.send_losses=false"]
    assert ReplyRules.of(tiny()) == ReplyRules()
    assert ReplyRules.of(tiny(*private)) == ReplyRules(losses=False, epsilons=True, max_examples=1)
    bounded = tiny("cohort.max_examples=7", "cohort.max_update_norm=0.5")
    assert ReplyRules.of(bounded) == ReplyRules(max_examples=7, max_update_norm=0.5)


def test_a_reason_is_one_printable_line_whatever_a_client_writes():
    message = request(node_of("a"))
    forged = error_reply(message, "no\n2026-01-01 WARNING round 9: all is well\x1b[2J\r" + "x" * 10**6)
    reason = reason_of(forged)
    assert "\n" not in reason
    assert "\x1b" not in reason
    assert len(reason) == validation.MAX_REASON
    assert reason_of(error_reply(message, " \n")) == "no reason given"


# Messages to a client -------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tiny, tmp_path: Path) -> Worker:
    return Worker(Federation(tiny("method=fed_sb", "adapter.basis=gradient")), ClientStore(tmp_path))


def asked(worker: Worker, kind: str = MessageType.TRAIN, **more: object) -> Message:
    client = worker.federation.clients[0]
    content = RecordDict({"config": instruct(client, 1, **more)})
    if kind == MessageType.TRAIN and GRADIENTS not in more:
        content["arrays"] = wire.pack(worker.model.read(worker.model.shared))
        content["setup"] = wire.pack(worker.model.read(worker.model.frozen))
    return Message(content, node_of(client), kind)


def asked_as(worker: Worker, kind: str) -> Message:
    """What would be a good message, were it not for its type."""
    good = asked(worker)
    return Message(good.content, good.metadata.dst_node_id, kind)


def without(message: Message, record: str) -> Message:
    del message.content[record]
    return message


def holding(message: Message, **records: object) -> Message:
    for name, record in records.items():
        message.content[name] = record  # type: ignore[assignment]
    return message


NUMBERS = wire.pack({"x": torch.zeros(3)})
BAD = {
    "another type": (lambda w: asked_as(w, "train.default"), "is of type 'train.default'"),
    "another type of question": (lambda w: asked_as(w, "query.default"), "is of type 'query.default'"),
    "evaluation": (lambda w: asked_as(w, "evaluate"), "is of type 'evaluate'"),
    "no content": (lambda w: error_reply(asked(w), "x"), "no content"),
    "no instructions": (lambda w: without(asked(w), "config"), "no 'config' record"),
    "no tensors": (lambda w: without(asked(w), "arrays"), "no 'arrays' record"),
    "another record": (lambda w: holding(asked(w), more=NUMBERS), "'more'.*nobody asked for"),
    "tensors of another kind": (lambda w: holding(asked(w), arrays=MetricRecord()), "'arrays' is a MetricRecord"),
    "tensors that are not needed": (lambda w: asked(w, personal=True), "no use for"),
    "a correction without description": (lambda w: holding(asked(w), correction=NUMBERS), "come together"),
    "a description without correction": (lambda w: asked(w, correction="[null,1,[],[],[]]"), "come together"),
    "a description that is none": (
        lambda w: holding(asked(w, correction="[" * 10**5), correction=NUMBERS), "describes no base correction"
    ),
    "a description of a module twice": (
        lambda w: holding(asked(w, correction='[null,1,["a","a"],[],[]]'), correction=NUMBERS), "describes no base"
    ),
    "a basis that is not finite": (
        lambda w: holding(
            asked(w), setup=wire.pack({k: v / 0 for k, v in w.model.read(w.model.frozen).items()})
        ),
        "not finite",
    ),
    "a basis of another size": (lambda w: holding(asked(w), setup=NUMBERS), "expected .* bytes"),
    "a basis to draw": (lambda w: holding(asked(w, basis=0)), "cannot draw"),
    "a basis of the future": (lambda w: asked(w, basis=1), "no round before this one"),
    "another client": (lambda w: holding(asked(w), config=instruct("stranger", 1)), r"\['stranger'\] are no clients"),
    "a pool of strangers": (lambda w: asked(w, pool=["x"]), "are no clients here"),
    "a pool of one twice": (lambda w: asked(w, pool=[w.federation.clients[0]] * 2), "list of different names"),
    "a client that is a number": (lambda w: asked(w, **{"client-id": 3}), "'client-id' is 3, not a name"),
    "round 0": (lambda w: asked(w, **{"server-round": 0}), "starts with round 1"),
    "round true": (lambda w: asked(w, **{"server-round": True}), "not the number of a round"),
    "a round without end": (lambda w: asked(w, **{"server-round": 10**6}), "not the number of a round"),
    "factors that are not": (lambda w: asked(w, train=["lora_Z"]), "no trained factor"),
    "a word for a switch": (lambda w: asked(w, restart="yes"), "'restart' is 'yes', not true or false"),
    "clipping without noise": (lambda w: asked(w, **{CLIP: 1.0}), "without 'noise-update'"),
    "noise that is not a number": (lambda w: asked(w, **{CLIP: 1.0, NOISE: math.nan}), "finite number from 0"),
    "clipping to nothing": (lambda w: asked(w, **{CLIP: 0.0, NOISE: 1.0}), "positive finite number"),
    "clipping to infinity": (lambda w: asked(w, **{CLIP: math.inf, NOISE: 1.0}), "positive finite number"),
    "gradients and tensors": (lambda w: holding(asked(w, gradients=True), arrays=NUMBERS), "nobody asked for"),
    "no gradients": (lambda w: asked(w, gradients=False), "'gradients' is False"),
    "gradients and a basis": (lambda w: asked(w, gradients=True, basis=0), "does not do"),
    "a question and tensors": (lambda w: holding(asked(w, MessageType.QUERY), arrays=NUMBERS), "nobody asked for"),
    "a question with an instruction": (lambda w: asked(w, MessageType.QUERY, restart=True), "does not do"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.QUERY])
def test_a_good_message_is_understood(worker: Worker, kind: str):
    assert not worker.handle(asked(worker, kind)).has_error()
    assert not worker.handle(asked(worker, gradients=True)).has_error()


@pytest.mark.parametrize("case", BAD)
def test_a_bad_message_is_refused_before_anything_is_stored(worker: Worker, tmp_path: Path, case: str):
    make, reason = BAD[case]
    with pytest.raises(FedloraError, match=reason):
        worker.handle(make(worker))
    assert not list(tmp_path.rglob("*"))
