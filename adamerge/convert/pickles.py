"""A reader of pickles that makes plain data and inert stand-ins, never an object of a class that the file names.

Nothing is imported, called or constructed but the few makers in this file. What a pickle would call stays a record of
that wish (`Inert`); tensors stay descriptions of where their bytes lie (`Stored`) until they are read.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_STORAGES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16},
        **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
        **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    }
)
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_PLAIN = re.compile(r"[<>|=]?(b1|[iufc]\d+)")  # numpy types without objects
_MOVED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # of Python 2


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes in a checkpoint, read by `read(key)`; of no type where the tensor says it."""

    key: str
    dtype: torch.dtype | None
    read: Callable[[str], Any]
    start: int = 0


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that is still in its file; offset and stride count elements, as in torch."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, contiguous and alone in its memory."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(self.storage.read(self.storage.key), dtype=self.dtype)
        place = self.storage.start + self.offset
        return torch.as_strided(flat, self.shape, self.stride, place).clone(memory_format=torch.contiguous_format)


@dataclass(eq=False)
class Array:
    """A numpy array of numbers; its values come after it is made."""

    dtype: Any = None
    shape: tuple[int, ...] = ()
    columns_first: bool = False
    data: bytes = b""

    def build(self, state: Any) -> None:
        """What numpy keeps of an array: version, shape, type, order, bytes."""
        _, shape, kind, self.columns_first, data = state
        if not isinstance(kind, Kind):
            raise pickle.UnpicklingError("an array of numpy without a type")
        self.shape, self.dtype, self.data = _sizes(shape), kind.dtype, data if isinstance(data, bytes) else _bytes(data)

    def read(self) -> Tensor:
        """The array as a tensor."""
        array = np.frombuffer(self.data, self.dtype).reshape(self.shape, order="F" if self.columns_first else "C")
        return torch.from_numpy(np.array(array, self.dtype.newbyteorder("="), order="C"))


@dataclass(eq=False)
class Kind:
    """A plain numpy type, whose byte order comes after it is made."""

    dtype: Any

    def build(self, state: Any) -> None:
        """What numpy keeps of a type: version, byte order, and nothing else for plain ones."""
        self.dtype = self.dtype.newbyteorder(state[1])


@dataclass(eq=False)
class Inert:
    """What stands where a pickle asked for an object of a class; keeps the object's state as data."""

    path: str
    state: dict[Any, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return Inert(self.path)

    def build(self, state: Any) -> None:
        """Keep an object's attributes, those in slots as well."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state |= part

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value

    def extend(self, values: Iterable[Any]) -> None:
        """Entries of a list of a class of its own."""
        for value in values:
            self.append(value)

    def append(self, value: Any) -> None:
        """One entry of such a list."""
        self.state[str(len(self.state))] = value

    add = append


class Named:
    """A class or function that a pickle names: called, it gives what its maker makes of the arguments, or an `Inert`.

    Args:
        path: Module and name.
        reader: Whose list of unknown names grows by what turns out to be unknown only when called.
    """

    def __init__(self, path: str, reader: "Reader") -> None:
        self.path, self._reader = path, reader

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.path in _MAKERS:
            return _MAKERS[self.path](*args)
        if self.path == "numpy.dtype":
            return self._kind(str(args[0]))
        if self.path == "torch._tensor._rebuild_from_type_v2":
            return args[0](*args[2])
        if self.path == "copyreg._reconstructor":
            return args[0]()
        return Inert(self.path)

    def _kind(self, name: str) -> Any:
        if _PLAIN.fullmatch(name):
            return Kind(np.dtype(name))
        self._reader.unknown[f"numpy.dtype('{name}')"] = None
        return Inert(self.path)


_Python: Any = pickle._Unpickler  # the one in Python, whose steps can be replaced; the type checker knows less of it


class Reader(_Python):
    """Reads one pickle as data.

    Args:
        file: Where it begins.
        storage: Reads a storage's bytes by its key.

    Attributes:
        unknown: The names in it that no maker knows, in the order in which they come.
        storages: The storages in it, by key.
    """

    def __init__(self, file: BinaryIO, storage: Callable[[str], Any]) -> None:
        super().__init__(file, encoding="latin1")
        self._storage = storage
        self.unknown: dict[str, None] = {}
        self.storages: dict[str, Storage] = {}
        self._made: dict[Any, Storage] = {}  # one for each place and type, so that ties can be seen

    def find_class(self, module: str, name: str) -> Any:
        """Never a class: what stands for it."""
        path = f"{_MOVED.get(module, module)}.{name}"
        if path in _DTYPES:
            return _DTYPES[path]
        if path not in _KNOWN and _storage_type(path) is None:
            self.unknown[path] = None
        return Named(path, self)

    def persistent_load(self, pid: Any) -> Any:
        """A storage, which a pickle of torch names by its key."""
        if pid[0] == "module":  # of torch < 1.6, with the class's source
            return pid[1]
        if pid[0] != "storage" or not isinstance(pid[1], Named):
            raise pickle.UnpicklingError(f"'{pid[0]}' lies outside of it")
        start = pid[5][1] if len(pid) > 5 and pid[5] else 0  # of a storage inside another, in torch < 0.4
        made = Storage(str(pid[2]), _storage_type(pid[1].path), self._storage, start)
        self.storages.setdefault(made.key, made)
        return self._made.setdefault((made.key, made.dtype, start), made)

    def _new(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.append(cls(*args))

    def _new_ex(self) -> None:
        self.stack.pop()
        self._new()

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], (Inert, Array, Kind)):
            self.stack[-1].build(state)  # attributes of anything else (a dict's metadata, a parameter's) are let go

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has names by number")

    dispatch = MappingProxyType(
        {
            **_Python.dispatch,
            **{pickle.NEWOBJ[0]: _new, pickle.NEWOBJ_EX[0]: _new_ex, pickle.BUILD[0]: _build},
            **dict.fromkeys((pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0]), _refuse),
        }
    )


def _storage_type(path: str) -> torch.dtype | None:
    """The type of a storage class; None for one without a type, and for what is no storage class."""
    found = re.fullmatch(r"torch\.(?:cuda\.)?(\w+)Storage", path)
    return _STORAGES.get(found[1]) if found else None


def _tensor(storage: Storage, offset: int, size: Any, stride: Any, *rest: Any) -> Stored:
    dtype = next((value for value in rest[2:3] if isinstance(value, torch.dtype)), None) or storage.dtype
    if dtype is None or not isinstance(offset, int):
        raise pickle.UnpicklingError("a tensor without a type")
    return Stored(storage, dtype, offset, _sizes(size), _sizes(stride))


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise pickle.UnpicklingError("a shape that is none")
    return tuple(values)


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise pickle.UnpicklingError(f"text in '{encoding}'")
    return text.encode(encoding)


def _first(value: Any, *rest: Any) -> Any:
    return value


_REBUILD = "torch._utils._rebuild_"
_MAKERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **dict.fromkeys(("collections.OrderedDict", "collections.Counter", "builtins.dict"), lambda *a: dict(*a)),
        "collections.defaultdict": lambda *args: {},
        **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, list, tuple, complex, bytearray)},
        **{"torch.Size": lambda *args: tuple(*args), "torch.device": lambda *args: args},
        **{"torch.serialization._get_layout": _first, "_codecs.encode": _bytes},
        **{f"{_REBUILD}tensor{version}": _tensor for version in ("", "_v2", "_v3")},
        **{f"{_REBUILD}parameter{kind}": _first for kind in ("", "_with_state")},
        **{f"torch.{name}": _first for name in ("nn.parameter.Parameter", "nn.parameter.Buffer")},
        **{f"numpy.{home}.multiarray._reconstruct": lambda *args: Array() for home in ("core", "_core")},
        **{f"numpy.{home}.multiarray.scalar": _first for home in ("core", "_core")},
        **{f"torch.jit._pickle.{name}": _first for name in ("restore_type_tag", "build_tensorlist", "build_intlist")},
        **{f"torch.jit._pickle.{name}": _first for name in ("build_doublelist", "build_boollist")},
    }
)
_KNOWN = frozenset(
    {
        *_MAKERS,
        *(f"builtins.{name}" for name in ("int", "float", "bool", "str", "bytes", "object")),
        *("torch.storage.UntypedStorage", "torch.UntypedStorage", "torch.Tensor"),
        *("numpy.dtype", "numpy.ndarray", "copyreg._reconstructor"),
        "torch._tensor._rebuild_from_type_v2",
    }
)
