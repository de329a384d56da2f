"""The parts of a pickle that was read: tensors that are still in their file, arrays of numpy, inert stand-ins."""

import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_DIMENSIONS = 64  # as many as numpy has


class Bytes(Protocol):
    """The bytes of a checkpoint's storages, by their keys."""

    def size(self, key: str) -> int:
        """Return the number of bytes of a storage, without reading them."""

    def read(self, key: str) -> bytearray:
        """Return the bytes of a storage."""


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Bytes in a checkpoint; without a type where each tensor names its own."""

    key: str
    dtype: torch.dtype | None
    bytes: Bytes
    start: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """A tensor that is still in its file; offset and stride count elements, as in torch."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes that the tensor takes once it is alone in its memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self) -> None:
        """Refuse a tensor that reaches beyond its storage, before anything of it is read.

        Raises:
            ValueError: The tensor ends after its storage, or has not one stride for each size.
        """
        if len(self.shape) != len(self.stride):
            raise ValueError(f"a shape of {len(self.shape)} sizes has {len(self.stride)} strides")
        if 0 in self.shape:
            return
        steps = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        end = (self.storage.start + self.offset + steps + 1) * self.dtype.itemsize
        there = self.storage.bytes.size(self.storage.key)
        if end > there:
            raise ValueError(f"one ends at byte {end:,} of a storage that has {there:,}")

    def read(self) -> Tensor:
        """Return the tensor, contiguous and alone in its memory."""
        self.check()
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(self.storage.bytes.read(self.storage.key), dtype=self.dtype)
        place = self.storage.start + self.offset
        return torch.as_strided(flat, self.shape, self.stride, place).clone(memory_format=torch.contiguous_format)


@dataclass(eq=False, repr=False, slots=True)
class Array:
    """A numpy array of numbers; its values come after it is made."""

    kind: Any = None  # of numpy
    shape: tuple[int, ...] = ()
    columns_first: bool = False
    data: bytes = b""

    def build(self, state: Any) -> None:
        """Take the state that numpy pickles of an array: version, shape, type, order, bytes."""
        _, shape, kind, order, data = state
        if not isinstance(kind, Kind) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array of numpy without a type or without bytes")
        self.shape, self.kind, self.columns_first, self.data = sizes(shape), kind.dtype, bool(order), data

    @property
    def nbytes(self) -> int:
        """The bytes of the array."""
        return len(self.data)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the array has as a tensor.

        Raises:
            ValueError: The array was never filled.
            TypeError: torch has no such type.
        """
        if self.kind is None:
            raise ValueError("an array of numpy without values")
        return torch.from_numpy(np.empty(0, self.kind.newbyteorder("="))).dtype

    def check(self) -> None:
        """Refuse a shape that does not fit the bytes.

        Raises:
            ValueError: Shape and bytes do not fit.
        """
        if self.kind is None or math.prod(self.shape) * self.kind.itemsize != len(self.data):
            raise ValueError(f"an array of numpy of the shape {self.shape} has {len(self.data):,} bytes")

    def read(self) -> Tensor:
        """Return the array as a tensor."""
        self.check()
        array = np.frombuffer(self.data, self.kind).reshape(self.shape, order="F" if self.columns_first else "C")
        return torch.from_numpy(np.array(array, self.kind.newbyteorder("="), order="C"))


@dataclass(eq=False)
class Kind:
    """A plain numpy type, whose byte order comes after it is made."""

    dtype: Any

    def build(self, state: Any) -> None:
        """Take the state that numpy pickles of a type: version, byte order, and nothing else for plain ones."""
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("a type of numpy without a byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


@dataclass(eq=False, repr=False, slots=True)
class Inert:
    """A stand-in for an object of a class that a pickle asked for; keeps the object's state as data."""

    path: str
    state: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.path}>"  # its state may hold itself

    def extend(self, values: Iterable[Any]) -> None:
        """Add the entries of a list whose class is not Python's own."""
        for value in values:
            self.append(value)

    def append(self, value: Any) -> None:
        """Add one entry of such a list."""
        self.state[str(len(self.state))] = value


@dataclass(frozen=True)
class Key:
    """The text of a dict's key that is no text or small number; a file cannot choose its hash."""

    text: str

    def __str__(self) -> str:
        return self.text


def sizes(values: Any) -> tuple[int, ...]:
    """Return the sizes or strides of a tensor as a tuple.

    Raises:
        UnpicklingError: The values are no sizes, or too many.
    """
    if not isinstance(values, (list, tuple)) or len(values) > _DIMENSIONS:
        raise pickle.UnpicklingError("a shape that is none")
    if not all(isinstance(value, int) and 0 <= value < 2**63 for value in values):
        raise pickle.UnpicklingError("a shape that is none")
    return tuple(values)
