"""Objects with large tensors as a small pickle and plain arrays, which Ray shares between processes without copies.

What two objects share, they still share on the other side: tied weights, or the one global state of a cohort.
"""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn

SMALL = 4096
"""NumPy arrays of at most this many bytes stay in the pickle."""


class Parcel(NamedTuple):
    """A pickle, and the arrays that it refers to by number."""

    pickled: bytes
    arrays: list[np.ndarray]


def ship(thing: Any, writable: Collection[int] = ()) -> Parcel:
    """Pickle ``thing`` with every plain CPU tensor and every large array beside the pickle.

    Args:
        thing: what to send; classes that a user's own file defines travel with it.
        writable: ``id`` of tensors that the receiver will change; with parameters that require gradients they are the
            only ones it gets as copies of its own.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, writable)
    pickler.dump(thing)
    return Parcel(buffer.getvalue(), pickler.arrays)


def unship(parcel: Parcel) -> Any:
    """Rebuild what was shipped; tensors that are not writable share the memory of the parcel's arrays."""
    return _Unpickler(io.BytesIO(parcel.pickled), parcel.arrays).load()


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, writable: Collection[int]) -> None:
        super().__init__(file, protocol=5)
        self.writable = frozenset(writable)
        self.arrays: list[np.ndarray] = []
        self._numbers: dict[int, tuple[Any, Any]] = {}  # the object itself too, so that no id is used twice

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) in (Tensor, nn.Parameter):
            if obj.device.type != "cpu" or obj.layout is not torch.strided:
                return None
        elif type(obj) is not np.ndarray or obj.nbytes <= SMALL or obj.dtype == object:
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = (self._described(obj), obj)
        return self._numbers[id(obj)][0]

    def _described(self, obj: Any) -> tuple[Any, ...]:
        number = len(self.arrays)
        if isinstance(obj, np.ndarray):
            self.arrays.append(obj)
            return (number, None, (), False, False, False)
        plain = obj.detach().contiguous()
        self.arrays.append(plain.reshape(-1).view(torch.uint8).numpy())
        own = obj.requires_grad or id(obj) in self.writable
        return (number, obj.dtype, tuple(obj.shape), type(obj) is nn.Parameter, obj.requires_grad, own)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) and obj.__module__.startswith("fedlora_plugin_") and obj.__module__ in sys.modules:
            cloudpickle.register_pickle_by_value(sys.modules[obj.__module__])
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: list[np.ndarray]) -> None:
        super().__init__(file)
        self.arrays = arrays
        self._built: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        number = pid[0]
        if number not in self._built:
            self._built[number] = self._build(*pid)
        return self._built[number]

    def _build(
        self, number: int, dtype: torch.dtype | None, shape: tuple[int, ...], parameter: bool, grad: bool, own: bool
    ) -> Any:
        array = self.arrays[number]
        if dtype is None:
            return array
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the array is read-only, and so we treat it
            flat = torch.from_numpy(array.copy() if own else array)
        tensor = flat.view(dtype).view(shape) if array.nbytes else torch.empty(shape, dtype=dtype)
        return nn.Parameter(tensor, requires_grad=grad) if parameter else tensor.requires_grad_(grad)
