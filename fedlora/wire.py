"""The wire format: one contiguous buffer a record, and the exact size of a message that carries it.

Both ends know the layout (names and shapes) from the configuration, so a message holds tensor bytes and about a
kilobyte of header. Flower stores every array with a 128-byte header and refuses bf16; a packed array has neither
limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES

from fedlora.errors import FedloraError

Layout = Mapping[str, tuple[int, ...]]
PACKED = "packed"
STYPE = "fedlora.packed"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def pack(state: Mapping[str, torch.Tensor], dtype: str = "fp32") -> ArrayRecord:
    """Return one flat array holding every tensor of ``state`` in order, cast to ``dtype``."""
    parts = [tensor.detach().reshape(-1).to(device="cpu", dtype=DTYPES[dtype]) for tensor in state.values()]
    flat = torch.cat(parts) if parts else torch.zeros(0, dtype=DTYPES[dtype])
    data = flat.contiguous().view(torch.uint8).numpy().tobytes()
    return ArrayRecord({PACKED: Array(dtype=_NAMES[dtype], shape=(flat.numel(),), stype=STYPE, data=data)})


def unpack(record: ArrayRecord, layout: Layout, dtype: str = "fp32") -> dict[str, torch.Tensor]:
    """Return the fp32 tensors of ``layout`` from a packed record.

    Raises:
        FedloraError: the record is not packed, or its type or size does not match the layout.
    """
    array = record.get(PACKED)
    if array is None or len(record) != 1 or array.stype != STYPE:
        raise FedloraError(f"expected one packed array, got arrays {sorted(record)}")
    if array.dtype != _NAMES[dtype]:
        raise FedloraError(f"expected wire.dtype {dtype}, got {array.dtype}")
    sizes = [prod(shape) for shape in layout.values()]
    expected = sum(sizes) * DTYPES[dtype].itemsize
    if len(array.data) != expected:
        raise FedloraError(f"expected {expected} bytes for {len(layout)} tensors, got {len(array.data)}")
    if expected == 0:
        return {key: torch.zeros(shape) for key, shape in layout.items()}
    flat = torch.frombuffer(bytearray(array.data), dtype=DTYPES[dtype]).float()
    pieces = flat.split(sizes)
    return {key: piece.view(shape) for (key, shape), piece in zip(layout.items(), pieces, strict=True)}


def to_record(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Ordinary Flower arrays, as strategies see them."""
    return ArrayRecord({key: Array(np.asarray(tensor.cpu().numpy(), order="C")) for key, tensor in state.items()})


def from_record(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Tensors of an ordinary (unpacked) record."""
    return {key: torch.from_numpy(np.array(array.numpy())) for key, array in record.items()}


def tensor_bytes(record: ArrayRecord) -> int:
    """Bytes of tensor data in a packed record."""
    return sum(len(array.data) for array in record.values())


def message_bytes(message: Message) -> int:
    """Exact length of the message as Flower serialises it: all its objects, headers included.

    Computed from shapes without hashing the tensors, which is what makes it cheap. Flower would store byte-identical
    arrays of one message once; packed records are never identical to each other.
    """
    size = _object_bytes(
        "Message", int(message.has_content()), len(_body(remove_content_from_message(message).deflate()))
    )
    if not message.has_content():
        return size
    content = message.content
    size += _references("RecordDict", list(content))
    for record in content.values():
        if not isinstance(record, ArrayRecord):
            size += len(record.deflate())
            continue
        size += _references("ArrayRecord", list(record))
        for array in record.values():
            chunks = max(-(-len(array.data) // CHUNK_BYTES), 1 if array.data else 0)
            description = {
                "dtype": array.dtype,
                "shape": array.shape,
                "stype": array.stype,
                "arraychunk_ids": list(range(chunks)),
            }
            size += _object_bytes("Array", chunks, len(json.dumps(description)))
            for start in range(0, len(array.data), CHUNK_BYTES):
                size += _object_bytes("ArrayChunk", 0, min(CHUNK_BYTES, len(array.data) - start))
    return size


_ID_LENGTH = 64  # a SHA-256 in hexadecimal


def _object_bytes(kind: str, children: int, body: int) -> int:
    """Header ``kind child,child body_length`` and a separator, then the body."""
    return len(kind) + 1 + max(children * (_ID_LENGTH + 1) - 1, 0) + 1 + len(str(body)) + 1 + body


def _references(kind: str, names: list[str]) -> int:
    return _object_bytes(kind, len(names), len(json.dumps(dict.fromkeys(names, "0" * _ID_LENGTH))))


def _body(serialised: bytes) -> bytes:
    return serialised[serialised.index(b"\x00") + 1 :]
