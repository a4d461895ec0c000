"""Whatever a peer sends: what is good is accepted, anything else is refused, and nothing ever crashes.

Good messages are damaged at random. Whether the result is still good is decided here once more, by other means than in
:mod:`fedlora.validation`: NumPy on the raw bytes, and the rules written down a second time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedlora import wire
from fedlora.client import Worker, instruct
from fedlora.errors import FedloraError
from fedlora.federation import Federation
from fedlora.grid import CodecGrid, SetupGrid, node_of
from fedlora.ledger import Ledger
from fedlora.meter import MeterGrid
from fedlora.store import ClientStore
from fedlora.validation import ReplyRules
from tests.fedlora.helpers import Engine, assert_same, echo, request

few = settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=12_000, phases=[Phase.explicit, Phase.generate], database=None)

Content = dict[str, Any]
Damage = Callable[[Content], None]
LAYOUT: dict[str, tuple[int, ...]] = {"m.lora_B.weight": (3, 2), "m.lora_A.weight": (2, 5)}
STATE = {key: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for key, shape in LAYOUT.items()}

# Damage ---------------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=12) | st.just("x" * 5000)
WHOLE = st.integers(-(2**63), 2**64 - 1)  # what Flower carries; in a list it takes no such range
SMALLER = st.integers(-(2**63), 2**63 - 1)
NUMBER = WHOLE | st.sampled_from([-1, 0, 1, 2, 2**31, 2**53, 2**53 + 1]) | st.floats()
SCALAR = NUMBER | st.booleans() | TEXT | st.binary(max_size=8)
LISTS = st.lists(SMALLER, max_size=3) | st.lists(st.floats(), max_size=3) | st.lists(TEXT, max_size=3)
DTYPE = st.sampled_from(["float32", "float16", "bfloat16", "float64", "object", "<f4", ">f4"]) | TEXT
STYPE = st.sampled_from(["numpy.ndarray", "pickle", wire.STYPE.upper()]) | TEXT
SHAPE = st.lists(st.integers(-3, 2**70) | st.just(16), max_size=3).map(tuple)
METRIC = NUMBER | st.lists(SMALLER, max_size=3) | st.lists(st.floats(), max_size=3)
ANY_ARRAY = st.builds(
    lambda data, dtype, stype, shape: Array(dtype=dtype, shape=shape, stype=stype, data=data),
    st.binary(max_size=80), DTYPE, STYPE | st.just(wire.STYPE), SHAPE,
)  # fmt: skip
ANY_RECORD = (
    st.dictionaries(st.sampled_from([wire.PACKED, "x"]), ANY_ARRAY, max_size=2).map(ArrayRecord)
    | st.dictionaries(TEXT, METRIC, max_size=3).map(MetricRecord)
    | st.dictionaries(TEXT, SCALAR | LISTS, max_size=3).map(ConfigRecord)
)
NAME = st.sampled_from(["arrays", "metrics", "config", "setup", "correction", "capability", "Arrays", ""]) | TEXT


@st.composite
def of_records(draw: st.DrawFn, names: list[str]) -> Damage:
    """A record less, one more, or another one in its place."""
    name = draw(st.sampled_from(names) | NAME)
    record = draw(st.none() | ANY_RECORD)
    return lambda content: content.pop(name, None) if record is None else content.__setitem__(name, record)


@st.composite
def of_array(draw: st.DrawFn, names: list[str]) -> Damage:
    """Bits, numbers, length, type, shape, way of storing or name of the array in a record."""
    name, where = draw(st.sampled_from(names)), draw(st.integers(0, 2**32))
    change = draw(st.sampled_from(["bit", "number", "less", "more", "dtype", "stype", "shape", "name", "second"]))
    value: Any = draw(
        {
            "bit": st.integers(0, 7), "number": st.floats(width=32), "less": st.integers(1, 90),
            "more": st.binary(min_size=1, max_size=9), "dtype": DTYPE, "stype": STYPE, "shape": SHAPE,
            "name": TEXT, "second": ANY_ARRAY,
        }[change]
    )  # fmt: skip

    def damage(content: Content) -> None:
        record = content.get(name)
        if not isinstance(record, ArrayRecord) or wire.PACKED not in record:
            return
        old = record[wire.PACKED]
        data = bytearray(old.data)
        parts = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype}
        if change in parts:
            parts[change] = value
        elif change == "bit" and data:
            data[where % len(data)] ^= 1 << value
        elif change == "number" and len(data) >= 4:
            at = 4 * (where % (len(data) // 4))
            data[at : at + 4] = np.float32(value).tobytes()
        elif change == "less":
            del data[:value]
        elif change == "more":
            data += value
        arrays = {value if change == "name" else wire.PACKED: Array(**parts, data=bytes(data))}
        if change == "second":
            arrays["second"] = value
        content[name] = ArrayRecord(arrays)

    return damage


@st.composite
def of_values(draw: st.DrawFn, record: str, names: list[str], values: st.SearchStrategy[Any]) -> Damage:
    """A value less, one more, or another one in its place, in a record of metrics or settings."""
    name = draw(st.sampled_from(names) | TEXT)
    value = draw(st.none() | values)

    def damage(content: Content) -> None:
        old = content.get(record)
        if isinstance(old, MetricRecord | ConfigRecord):
            kept = {key: each for key, each in old.items() if key != name}
            try:
                content[record] = type(old)({**kept, **({} if value is None else {name: value})})
            except TypeError:
                return  # Flower does not make such a record

    return damage


def is_finite_array(content: Content, name: str, count: int) -> bool:
    record = content.get(name)
    if type(record) is not ArrayRecord or list(record) != [wire.PACKED]:
        return False
    array = record[wire.PACKED]
    header = (array.dtype, array.stype, array.shape, len(array.data))
    if header != ("float32", wire.STYPE, (count,), 4 * count):
        return False
    exponents = np.frombuffer(array.data, np.uint32) >> 23 & 0xFF
    return not bool((exponents == 0xFF).any())


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The server -----------------------------------------------------------------------------------------------------------

REPLY_DAMAGE = st.lists(
    of_records(["arrays", "metrics"])
    | of_array(["arrays"])
    | of_values("metrics", ["num-examples", "train_loss", "epsilon"], METRIC),
    max_size=3,
)


def is_good_reply(content: Content) -> bool:
    metrics = content.get("metrics")
    if set(content) != {"arrays", "metrics"} or type(metrics) is not MetricRecord:
        return False
    if set(metrics) not in ({"num-examples", "train_loss"}, {"num-examples"}):
        return False
    examples = metrics["num-examples"]
    if not isinstance(examples, int) or not 1 <= examples <= 2**53 or not is_number(metrics.get("train_loss", 0.0)):
        return False
    return is_finite_array(content, "arrays", 16)


def check_reply(damages: list[Damage]) -> None:
    content: Content = {
        "arrays": wire.pack(STATE),
        "metrics": MetricRecord({"num-examples": 3, "train_loss": 0.25}),
    }
    for damage in damages:
        damage(content)

    def answer(message: Message) -> Message:
        hostile = message.metadata.dst_node_id == node_of("adam")
        return Message(RecordDict(dict(content)), reply_to=message) if hostile else echo(message)

    ledger = Ledger()
    stack = SetupGrid(MeterGrid(Engine(answer), ledger), {"m.basis": torch.zeros(2)})
    grid = CodecGrid(stack, lambda client: LAYOUT, lambda client, parts: LAYOUT, "fp32", ReplyRules())
    grid.begin_round(1, ["zoe", "adam", "mia"])
    record = wire.to_record(STATE)
    zoe, adam, mia = grid.send_and_receive([request(node, record) for node in grid.get_node_ids()])
    for honest in (zoe, mia):
        assert_same(wire.from_record(honest.content.array_records["arrays"]), STATE)
    assert adam.has_error() != is_good_reply(content)
    if adam.has_content():
        assert all(bool(value.isfinite().all()) for value in wire.from_record(adam.content["arrays"]).values())
    ledger.refuse(1, "adam", adam.error.reason if adam.has_error() else "ok")
    assert all(len(entry.status) <= 200 for entry in ledger.entries)


@few
@given(REPLY_DAMAGE)
def test_a_damaged_reply_is_refused_and_costs_only_its_client(damages: list[Damage]):
    check_reply(damages)


@pytest.mark.slow
@many
@given(REPLY_DAMAGE)
def test_12000_damaged_replies_are_refused_and_cost_only_their_client(damages: list[Damage]):
    check_reply(damages)


# A client -------------------------------------------------------------------------------------------------------------

INSTRUCTIONS = [
    "server-round", "client-id", "pool", "personal", "correction", "restart", "train", "basis", "clip-update",
    "noise-update", "gradients",
]  # fmt: skip
LIKELY = st.sampled_from(["site 00", "site 01", ["site 00"], ["site 01", "site 00"], ["lora_R"], ["lora_A"], [""]])
HEADERS = st.sampled_from(
    ['[0,1,[],[],[]]', '[1,2,[],[],[]]', '[null,1,["nowhere"],[],[]]', '[null,1,[],["nowhere"],[[3]]]', "[", "{}", "7",
     '[true,2,[],[],[]]', '[null,1,[],[]]', '[null,1,"",[],[]]', '[null,1,[],[],[[-1]]]', "[" * 3000, "1" * 5000]
)  # fmt: skip
MESSAGE_DAMAGE = st.lists(
    of_records(["arrays", "setup", "correction", "config"])
    | of_array(["arrays", "setup", "correction"])
    | of_values("config", INSTRUCTIONS, SCALAR | LISTS | LIKELY | HEADERS)
    | of_values("config", ["correction"], HEADERS),
    max_size=3,
)
OTHERS = ["train.default", "query.default", "evaluate"]
KINDS = st.sampled_from([MessageType.TRAIN] * 5 + [MessageType.QUERY] * 2 + OTHERS)


class Target:
    """A client of Fed-SB with a new base, which needs everything that a message can hold."""

    def __init__(self, worker: Worker) -> None:
        self.worker, model = worker, worker.model
        self.client = worker.federation.clients[0]
        self.clients = list(worker.federation.index.train)
        module, (m, n) = next(iter(model.weight_shapes.items()))
        self.correction = m * n
        self.content: Content = {
            "config": instruct(self.client, 2, correction=json.dumps([None, 1, [module], [], []])),
            "arrays": wire.pack(model.read(model.shared)),
            "setup": wire.pack(model.read(model.frozen)),
            "correction": wire.pack({module: torch.ones(m, n)}),
        }
        self.header = self.content["config"]["correction"]
        self.shared = sum(math.prod(shape) for shape in model.shapes(model.shared).values())
        self.frozen = sum(math.prod(shape) for shape in model.shapes(model.frozen).values())

    def is_good(self, content: Content, kind: str) -> bool:
        config = content.get("config")
        if type(config) is not ConfigRecord or kind not in (MessageType.TRAIN, MessageType.QUERY):
            return False
        said = dict(config)
        server_round, client = said.pop("server-round", None), said.pop("client-id", None)
        if type(server_round) is not int or not 0 <= server_round < 10**6 or client not in self.clients:
            return False
        if kind == MessageType.QUERY or "gradients" in said:
            return set(content) == {"config"} and (said == {} if kind == MessageType.QUERY else self._true(said))
        return server_round > 0 and self._trains(content, said, server_round)

    def _true(self, said: dict[str, Any]) -> bool:
        return list(said) == ["gradients"] and said["gradients"] is True

    def _trains(self, content: Content, said: dict[str, Any], server_round: int) -> bool:
        pool, train = said.pop("pool", []), said.pop("train", [])
        personal, restart, header = said.pop("personal", False), said.pop("restart", False), said.pop("correction", 0)
        if "clip-update" in said and "noise-update" in said:
            clip, noise = said.pop("clip-update"), said.pop("noise-update")
            if not is_number(clip) or not is_number(noise) or clip <= 0 or noise < 0:
                return False
        expected = {"config", "arrays", "setup"} | ({"correction"} if header != 0 else set())
        return (
            said == {}
            and isinstance(pool, list)
            and set(pool) <= set(self.clients)
            and len(set(pool)) == len(pool)
            and train in ([], ["lora_R"])
            and personal is False
            and restart is False
            and set(content) == expected
            and is_finite_array(content, "arrays", self.shared)
            and is_finite_array(content, "setup", self.frozen)
            and (header == 0 or self._corrects(content, header))
        )

    def _corrects(self, content: Content, header: object) -> bool:
        return header == self.header and is_finite_array(content, "correction", self.correction)


@pytest.fixture(scope="module")
def target(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Target:
    from simulations.compose import compose_config

    config = compose_config([*tiny_overrides, "adapter.rank=4", "method=fed_sb", "adapter.basis=gradient"])
    return Target(Worker(Federation(config), ClientStore(tmp_path_factory.mktemp("clients"))))


def check_message(target: Target, kind: str, damages: list[Damage]) -> None:
    content = dict(target.content)
    if kind == MessageType.QUERY:
        content = {"config": instruct(target.client, 2)}
    for damage in damages:
        damage(content)
    message = Message(RecordDict(dict(content)), node_of(target.client), kind)
    shared = target.worker.store.folder / "_shared"
    before = sorted(shared.glob("*")) if shared.exists() else []
    try:
        if kind == MessageType.TRAIN and "gradients" not in content.get("config", {}):
            target.worker.open(message)  # and no training, which would take long
        else:
            target.worker.handle(message)
        accepted = True
    except FedloraError:
        accepted = False
    assert accepted == target.is_good(content, kind)
    if not accepted:
        assert (sorted(shared.glob("*")) if shared.exists() else []) == before


@few
@given(KINDS, MESSAGE_DAMAGE)
def test_a_damaged_message_is_refused_and_leaves_nothing(target: Target, kind: str, damages: list[Damage]):
    check_message(target, kind, damages)


@pytest.mark.slow
@many
@given(KINDS, MESSAGE_DAMAGE)
def test_12000_damaged_messages_are_refused_and_leave_nothing(target: Target, kind: str, damages: list[Damage]):
    check_message(target, kind, damages)
