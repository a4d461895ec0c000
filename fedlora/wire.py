"""The wire format: one contiguous buffer a record, and the exact size of a message that carries it.

Both ends know the layout (names and shapes) from the configuration and from what a client has announced, so a message
holds tensor bytes and about a kilobyte of header. Flower stores every array with a 128-byte header and refuses bf16; a
packed array has neither limit.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from functools import lru_cache, wraps
from math import prod
from typing import Any, Self, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata

from fedlora.errors import FedloraError

Result = TypeVar("Result")
Layout = Mapping[str, tuple[int, ...]]
Record = ArrayRecord | ConfigRecord | MetricRecord
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
    """Return the fp32 tensors of ``layout`` from a packed record: views of one buffer of their own.

    Raises:
        FedloraError: the record is not packed, or its type or size does not match the layout.
    """
    return views(numbers(record, layout, dtype), layout)


def require_layout(record: ArrayRecord, layout: Layout, dtype: str = "fp32") -> Array:
    """Return the one array of a packed record.

    Raises:
        FedloraError: the record is not packed, or its type, shape or size does not match the layout.
    """
    array = record.get(PACKED)
    if array is None or len(record) != 1 or array.stype != STYPE:
        stored = {name: each.stype for name, each in record.items()}
        raise FedloraError(f"expected one packed array ({STYPE}), got {reprlib.repr(stored)}")
    if array.dtype != _NAMES[dtype]:
        raise FedloraError(f"expected wire.dtype {dtype}, got {array.dtype[:20]}")
    count = sum(map(prod, layout.values()))
    expected = count * DTYPES[dtype].itemsize
    if len(array.data) != expected:
        raise FedloraError(f"expected {expected} bytes for {len(layout)} tensors, got {len(array.data)}")
    if array.shape != (count,):
        raise FedloraError(f"expected shape ({count},), got {reprlib.repr(array.shape)}")
    return array


def numbers(record: ArrayRecord, layout: Layout, dtype: str = "fp32") -> torch.Tensor:
    """Return a copy of all numbers of a packed record in fp32, shape ``[numbers of layout]``.

    Raises:
        FedloraError: as :func:`require_layout`.
    """
    data = require_layout(record, layout, dtype).data
    if not data:
        return torch.zeros(0)
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(DTYPES[dtype]).float()


def views(flat: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors of ``layout`` that lie one after the other in ``flat``; they share its memory."""
    pieces = flat.split([prod(shape) for shape in layout.values()]) if layout else ()
    return {key: piece.view(shape) for (key, shape), piece in zip(layout.items(), pieces, strict=True)}


class TensorRecord(ArrayRecord):
    """An ordinary record that holds tensors and makes Flower's arrays of them when somebody asks for one.

    An array costs a copy through NumPy's file format, in and out, which strategies of ours can do without: they read
    the tensors by :func:`from_record`. Names are known without arrays; whatever else is asked of it, a copy or a pickle
    included, makes the arrays, and from then on it is a record like any other.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold ``tensors`` as they are, without a copy."""
        super().__init__()
        self.__dict__["_tensors"] = dict(tensors)

    @property
    def tensors(self) -> dict[str, torch.Tensor] | None:
        """What it was made of, or ``None`` once it holds arrays."""
        return self.__dict__["_tensors"]

    def _arrays(self) -> dict[str, Array]:
        data: dict[str, Array] = self.__dict__["_data"]
        if self.tensors is not None:
            for key, tensor in self.tensors.items():
                data[key] = Array(np.asarray(tensor.detach().cpu().numpy(), order="C"))
            self.__dict__["_tensors"] = None
        return data

    def __getitem__(self, item: str) -> Array:
        return self._arrays()[item]

    def __setitem__(self, key: str, value: Array) -> None:
        self._arrays()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        del self._arrays()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __repr__(self) -> str:
        return repr(self._arrays())

    def __eq__(self, other: object) -> bool:
        self._arrays()
        if isinstance(other, TensorRecord):
            other._arrays()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]  as of every record: it can change

    def __getstate__(self) -> dict[str, Any]:
        self._arrays()
        return self.__dict__

    def keys(self) -> KeysView[str]:
        """The names, without making arrays."""
        return (self._arrays() if self.tensors is None else self.tensors).keys()

    def values(self) -> ValuesView[Array]:
        """The arrays."""
        return self._arrays().values()

    def items(self) -> ItemsView[str, Array]:
        """Names and arrays."""
        return self._arrays().items()

    def copy(self) -> Self:
        """A shallow copy."""
        copied = type(self)({})
        copied.__dict__.update(_data=self._arrays().copy(), _tensors=None)
        return copied

    def deflate(self) -> bytes:
        """Its serialised form, under the name of the class that Flower makes of it again."""
        plain = ArrayRecord()
        plain.__dict__["_data"] = self._arrays()
        return plain.deflate()


def to_record(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """An ordinary record of a copy of ``state``, as strategies see it."""
    return TensorRecord({key: tensor.detach().cpu().clone() for key, tensor in state.items()})


def from_record(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Tensors of an ordinary (unpacked) record; they may share its memory."""
    if isinstance(record, TensorRecord) and record.tensors is not None:
        return dict(record.tensors)
    return {key: torch.from_numpy(np.array(array.numpy())) for key, array in record.items()}


def tensor_bytes(record: ArrayRecord) -> int:
    """Bytes of tensor data in a packed record."""
    return sum(len(array.data) for array in record.values())


def message_bytes(message: Message) -> int:
    """Exact length of the message as Flower serialises it: all its objects, headers included.

    Computed from shapes without hashing the tensors, which is what makes it cheap. Flower would store byte-identical
    arrays of one message once; packed records are never identical to each other.
    """
    metadata = metadata_to_proto(message.metadata)
    metadata.message_id = ""
    return _total(message_object(message, metadata))


Object = tuple[int, tuple["Object", ...]]
"""An object that Flower makes of a message or of a part of it: its length in bytes, and its children."""


def message_object(message: Message, metadata: ProtoMetadata) -> Object:
    """The objects of a message that has this ``metadata``, as a tree."""
    children = (_content_object(message.content),) if message.has_content() else ()
    error = error_to_proto(message.error) if message.has_error() else None
    return _object_bytes("Message", len(children), ProtoMessage(metadata=metadata, error=error).ByteSize()), children


def _content_object(content: RecordDict) -> Object:
    return _references("RecordDict", tuple(content)), tuple(_record_object(record) for record in content.values())


def _record_object(record: Record) -> Object:
    if not isinstance(record, ArrayRecord):
        return len(record.deflate()), ()
    arrays = (_array_object(array.dtype, array.shape, array.stype, len(array.data)) for array in record.values())
    return _references("ArrayRecord", tuple(record)), tuple(arrays)


def _total(tree: Object) -> int:
    return tree[0] + sum(map(_total, tree[1]))


_ID_LENGTH = 64  # a SHA-256 in hexadecimal


def _object_bytes(kind: str, children: int, body: int) -> int:
    """Header ``kind child,child body_length`` and a separator, then the body."""
    return len(kind) + 1 + max(children * (_ID_LENGTH + 1) - 1, 0) + 1 + len(str(body)) + 1 + body


def remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """``function``, with its results kept for small arguments; large ones are a stranger's, and would fill memory."""
    kept = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def call(*arguments: Any) -> Result:
        return (kept if len(repr(arguments)) <= 1000 else function)(*arguments)

    return call


@remembered
def _references(kind: str, names: tuple[str, ...]) -> int:
    return _object_bytes(kind, len(names), len(json.dumps(dict.fromkeys(names, "0" * _ID_LENGTH))))


@remembered
def _array_object(dtype: str, shape: tuple[int, ...], stype: str, length: int) -> Object:
    """An array of ``length`` bytes and its chunks."""
    chunks = [min(CHUNK_BYTES, length - start) for start in range(0, length, CHUNK_BYTES)]
    description = {"dtype": dtype, "shape": shape, "stype": stype, "arraychunk_ids": list(range(len(chunks)))}
    own = _object_bytes("Array", len(chunks), len(json.dumps(description)))
    return own, tuple((_object_bytes("ArrayChunk", 0, chunk), ()) for chunk in chunks)
