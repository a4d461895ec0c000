"""The bytes on a client's socket that one message causes in a deployment: Flower 1.41 over HTTP, plain or TLS.

A client fetches a message with one HTTP request for its description, one for each of its objects (the message, its
records, their arrays, chunks of at most 5 MiB: :data:`fedlora.wire.Object`) and one that confirms it. It sends a reply
with one request for the description and one for each object. So a message travels both ways: requests that fetch it go
up, what the server says to a reply comes down. A request has about 0.84 kB of headers, most of it the client's public
key and signature, a response 0.13 kB. Bodies are protocol buffers of known fields; nothing is compressed.

Over TLS 1.3 every piece of at most :data:`RECORD` bytes costs :data:`RECORD_OVERHEAD` more; a head is one piece.

Ids are counted at their longest and the server's address at :data:`ADDRESS` letters. **Not counted**, because no
message causes it (plain; over TLS 22 to 44 bytes more each way):

- asking for a message when there is none, at once after a reply and then every 3 s: 854 bytes up, 128 down;
- a heartbeat every 30 s: 869 bytes up, 130 down;
- once: registering and leaving (3.9 kB up, 0.5 kB down), the app (1.8 kB up, its size and 0.7 kB down);
- the TLS handshake of a connection: 0.6 kB up, 1.9 kB down with one RSA certificate of 2048 bits, more with a chain.
  Connections are kept alive for 5 s without a request, and objects travel over two at once, so that a client that works
  for longer in every round shakes hands three times a round;
- an object that is asked for again because the server had not got it yet, and whatever is repeated after a failure;
- pieces of less than :data:`RECORD` bytes in the middle of a body: 11 among the 770 of 12 MiB in one of six exchanges.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from flwr.app import Message
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    Reconnect,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedlora.wire import Object, message_object, remembered

REQUEST_HEAD = 811
"""Bytes of a request's head without the name of the call, the server's address and the digits of the body's length.

The request line and ``Host`` 34, what httpx says of itself 89, types and length of the body 84, Flower's versions 87,
public key 307 and signature 158 of a P-384 key, time 50, and the empty line.
"""
RESPONSE_HEAD = 127
"""The same of a response: status 17, date 37, server 17, type 36, length 18, and the empty line."""
ADDRESS = 24
"""Letters of the server's address and port, such as ``fedlora.example.org:9092``."""
RECORD, RECORD_OVERHEAD = 16384, 22
"""Longest piece that TLS 1.3 encrypts at once, and what each costs: header 5, type 1, authentication tag 16."""

_ID = 2**63  # ids are random numbers of 64 bits: none is longer than this one
_HASH = "0" * 64
_SESSION = "0" * 36


class Traffic(NamedTuple):
    """Bytes on a client's socket: ``down`` to the client, ``up`` from it."""

    down: int
    up: int


def transport_bytes(message: Message, direction: Literal["down", "up"], tls: bool = True) -> Traffic:
    """Bytes on the socket because ``message`` goes to a client (``direction`` is ``down``) or comes from it (``up``).

    It depends on the sizes of the message's objects alone, so a message costs the same in a simulation and in a
    deployment, whatever its ids.
    """
    metadata = metadata_to_proto(message.metadata)
    metadata.run_id, metadata.message_id = _ID, ""
    if direction == "down":
        metadata.src_node_id, metadata.dst_node_id, metadata.src_task_id = 1, _ID, _ID
    else:
        metadata.src_node_id, metadata.dst_node_id, metadata.dst_task_id = _ID, 1, _ID
    tree = message_object(message, metadata)
    metadata.message_id = _HASH
    metadata.ClearField("src_task_id")  # the description does not say it
    described = ProtoMessage(
        metadata=metadata,
        content=ProtoRecordDict() if message.has_content() else None,
        error=error_to_proto(message.error) if message.has_error() else None,
    )
    return (_pulled if direction == "down" else _pushed)(described.ByteSize(), tree, tls)


@remembered
def _pulled(described: int, tree: Object, tls: bool) -> Traffic:
    """Fetching a message: its description, every object, and a confirmation."""
    node = Node(node_id=_ID)
    answer = PullMessagesResponse(message_object_trees=[_tree(tree)]).ByteSize() + _field(described)
    wish = PullObjectRequest(node=node, run_id=_ID, object_id=_HASH).ByteSize()
    done = ConfirmMessageReceivedRequest(node=node, run_id=_ID, message_object_id=_HASH).ByteSize()
    return _sum(
        _call("pull-messages", PullMessagesRequest(node=node).ByteSize(), answer, tls),
        *(_call("pull-object", wish, 4 + _field(size), tls) for size in _sizes(tree)),  # found and available: 2 and 2
        _call("confirm-message-received", done, 0, tls),
    )


@remembered
def _pushed(described: int, tree: Object, tls: bool) -> Traffic:
    """Sending a message: its description, to which the server answers what it lacks, and every object."""
    node, sizes = Node(node_id=_ID), _sizes(tree)
    offer = PushMessagesRequest(node=node, message_object_trees=[_tree(tree)], clientapp_runtime_list=[1.0])
    lacking = PushMessagesResponse(
        reconnect=Reconnect(reconnect=5), results={_HASH: 0}, objects_to_push=[_HASH] * len(sizes), session_id=_SESSION
    )
    empty = PushObjectRequest(node=node, run_id=_ID, object_id=_HASH, session_id=_SESSION).ByteSize()
    return _sum(
        _call("push-messages", offer.ByteSize() + _field(described), lacking.ByteSize(), tls),
        *(_call("push-object", empty + _field(size), 2, tls) for size in sizes),  # stored: 2
    )


def _call(name: str, request: int, response: int, tls: bool) -> Traffic:
    """One HTTP request and its response, from the lengths of their bodies."""
    up = REQUEST_HEAD + len(name) + ADDRESS + len(str(request)) + request
    down = RESPONSE_HEAD + len(str(response)) + response
    return Traffic(down + tls * _records(response), up + tls * _records(request))


def _records(body: int) -> int:
    """What TLS adds to a head and a body."""
    return RECORD_OVERHEAD * (1 - -body // RECORD)


def _sum(*parts: Traffic) -> Traffic:
    return Traffic(sum(part.down for part in parts), sum(part.up for part in parts))


def _field(length: int) -> int:
    """Bytes of a protocol buffer's field of ``length`` bytes: tag, the length in groups of seven bits, and itself."""
    return 1 + max(-(-length.bit_length() // 7), 1) + length


def _sizes(tree: Object) -> list[int]:
    return [tree[0], *(size for child in tree[1] for size in _sizes(child))]


def _tree(tree: Object) -> ObjectTree:
    return ObjectTree(object_id=_HASH, children=[_tree(child) for child in tree[1]])
