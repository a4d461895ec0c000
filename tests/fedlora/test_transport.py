"""What a message is said to cost on a client's socket, against a proxy that counts between Flower's own programs."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import wire
from fedlora.grid import error_reply, node_of
from fedlora.transport import ADDRESS, RECORD, RECORD_OVERHEAD, Traffic, transport_bytes
from tests.fedlora.helpers import serialised_bytes
from tests.fedlora.wiretap import Exchange, run_deployed

# What no message causes, without TLS, from a client at ``127.0.0.1:12345``; asking again for what is not there yet.
POLL, HEARTBEAT, HANDSHAKE, AGAIN = Traffic(128, 854), Traffic(130, 869), Traffic(1903, 597), Traffic(130, 929)
PAUSE = 3.0  # seconds between two questions whether there is a message
LOCAL = len("127.0.0.1:12345")
RECORDS = st.dictionaries(st.text(min_size=1, max_size=12), st.integers(0, 2000), max_size=4)


def message_of(sizes: dict[str, int], client: str = "a", **config: int) -> Message:
    content = RecordDict({"config": ConfigRecord({"client-id": client, **config})})
    for name, size in sizes.items():
        array = Array(dtype="float32", shape=(size,), stype=wire.STYPE, data=bytes(size))
        content[f"arrays {name}"] = ArrayRecord({wire.PACKED: array})
    return Message(content, node_of(client), MessageType.TRAIN)


def answer_to(request: Message, sizes: dict[str, int]) -> Message:
    request.metadata.__dict__["_message_id"] = "f" * 64
    content = RecordDict({"metrics": MetricRecord({"num-examples": 3}), **message_of(sizes).content})
    return Message(content, reply_to=request)


@settings(deadline=None, max_examples=60)
@given(RECORDS, RECORDS, st.text(max_size=20), st.text(max_size=200))
def test_no_message_costs_less_than_its_length(down, up, client, reason):
    request = message_of(down, client)
    for tls in (False, True):
        assert transport_bytes(request, "down", tls).down > serialised_bytes(request)
        for reply in (answer_to(request, up), error_reply(request, reason)):
            assert transport_bytes(reply, "up", tls).up > serialised_bytes(reply)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_every_chunk_of_an_array_is_a_request(extra: int):
    one, more = (transport_bytes(message_of({"x": size}), "down", False) for size in (4, 2 * wire.CHUNK_BYTES + extra))
    chunks = 3 if extra > 0 else 2
    assert (chunks - 1) * 900 < more.up - one.up < (chunks - 1) * 1000
    assert more.down > 2 * wire.CHUNK_BYTES


def test_tls_costs_a_little_for_every_piece():
    message = message_of({"x": 4 * RECORD})
    plain, secret = (transport_bytes(message, "down", tls) for tls in (False, True))
    requests = 8  # description, message, records, config, arrays, array, chunk, and a confirmation
    assert (secret.up - plain.up) % RECORD_OVERHEAD == (secret.down - plain.down) % RECORD_OVERHEAD == 0
    assert secret.up - plain.up == requests * 2 * RECORD_OVERHEAD
    assert secret.down - plain.down == ((requests - 1) * 2 + 1 + 4) * RECORD_OVERHEAD


def test_ids_do_not_matter():
    one, other = message_of({"x": 8}, "a"), message_of({"x": 8}, "b")
    other.metadata.__dict__["_run_id"] = 2**63
    assert wire.message_bytes(one) != wire.message_bytes(other)
    assert transport_bytes(one, "down") == transport_bytes(other, "down")


@pytest.mark.slow
@pytest.mark.parametrize(("tls", "seconds"), [(False, 0), (True, 0), (True, 7)], ids=["plain", "tls", "slow"])
def test_a_deployed_client_sends_and_receives_what_was_said(tls: bool, seconds: int, tmp_path: Path) -> None:
    for exchange in run_deployed(tmp_path, [10_240, 1_048_576, 12_582_912], tls, seconds):
        assert exchange.connections <= 3
        assert is_explained(exchange, tls), exchange


def is_explained(exchange: Exchange, tls: bool) -> bool:
    """Whether handshakes, a few questions for a message and at most one heartbeat are all that passed besides.

    Up to a few bytes: ids and signatures are counted at their longest.
    """
    chunks = -(-exchange.size // wire.CHUNK_BYTES)
    requests = 13 + 2 * chunks
    shaken, record = tls * exchange.connections, tls * RECORD_OVERHEAD
    down = exchange.seen.down - exchange.said.down - shaken * HANDSHAKE.down
    up = exchange.seen.up - exchange.said.up - shaken * HANDSHAKE.up + requests * (ADDRESS - LOCAL)
    # The server says in 24 bytes that it closes a connection, and at times makes more pieces of a large body.
    more = 12 + tls * (3 * 24 + 10 * (chunks - 1) * RECORD_OVERHEAD)
    polls, beats = range(int(exchange.seconds / PAUSE) + 2), range(2)
    return any(
        -12 <= down - record * (p + 2 * b + 2 * a) - p * POLL.down - b * HEARTBEAT.down - a * AGAIN.down <= more
        and -6 * requests <= up - 2 * record * (p + b + a) - p * POLL.up - b * HEARTBEAT.up - a * AGAIN.up <= 12
        for p, b, a in product(polls, beats, range(2 * chunks - 1))
    )
