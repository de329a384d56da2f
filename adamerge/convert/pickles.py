"""A reader of pickles that makes plain data and inert stand-ins, never an object of a class that the file names.

Nothing is imported, called or constructed but the few makers of `makers.py`. What a pickle would call stays a record of
that wish (`Inert`); tensors stay descriptions of where their bytes lie (`Stored`) until they are read. Every step is
paid for from a `Budget`, copies by their length.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from adamerge.convert.budget import Budget
from adamerge.convert.makers import KNOWN, LONGEST, MAKERS, bytearray_of, is_place
from adamerge.convert.parts import Array, Bytes, Inert, Key, Kind, Storage, Stored

_STORAGES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16},
        **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
        **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    }
)
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_MOVED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # of Python 2
_PARTS = 200  # of a key that is a tuple
_SMALL = 2**60  # whole numbers below it have hashes of their own
_MEMO = 2**32


@dataclass(frozen=True, eq=False)
class Named:
    """A class or function that a pickle names."""

    path: str


_Python: Any = pickle._Unpickler  # the one in Python, whose steps can be replaced; the type checker knows less of it


class _Paid(dict[int, Callable[..., None]]):
    """The steps of a reader; each one counts against the budget when it is looked up."""

    budget: Budget

    def __getitem__(self, opcode: int) -> Callable[..., None]:
        self.budget.step(_COSTS.get(opcode, 1))
        return super().__getitem__(opcode)


class Reader(_Python):
    """Reads one pickle as data.

    Args:
        file: Where it begins.
        storages: The bytes of the storages that it names.
        budget: What reading may cost.

    Attributes:
        unknown: The names in it that no maker knows, in the order in which they come.
        storages: The storages in it, by key.
    """

    def __init__(self, file: BinaryIO | BufferedIOBase, storages: Bytes, budget: Budget) -> None:
        super().__init__(file, encoding="latin1")
        self._bytes, self._budget = storages, budget
        self.dispatch: Any = _Paid(type(self).dispatch)
        self.dispatch.budget = budget
        self.unknown: dict[str, None] = {}
        self.storages: dict[str, Storage] = {}
        self._made: dict[Any, Storage] = {}  # one for each place and type, so that ties can be seen

    def find_class(self, module: str, name: str) -> Any:
        """Never a class: what stands for it."""
        if len(module) + len(name) > LONGEST:
            raise pickle.UnpicklingError("a name without end")
        path = f"{_MOVED.get(module, module)}.{name}"
        if path in _DTYPES:
            return _DTYPES[path]
        if path not in KNOWN and _storage_type(path) is None:
            self.unknown[path] = None
        return Named(path)

    def persistent_load(self, pid: Any) -> Any:
        """A storage, which a pickle of torch names by its key."""
        if not isinstance(pid, tuple) or len(pid) < 2 or pid[0] not in ("module", "storage"):
            raise pickle.UnpicklingError("something lies outside of it")
        if pid[0] == "module":  # of torch < 1.6, with the class's source
            return pid[1]
        start = pid[5][1] if len(pid) > 5 and pid[5] else 0  # of a storage inside another, in torch < 0.4
        if not isinstance(pid[1], Named) or not isinstance(pid[2], (str, int)) or not is_place(start):
            raise pickle.UnpicklingError("a storage that is none")
        made = Storage(self._key(str(pid[2])), _storage_type(pid[1].path), self._bytes, start)
        self.storages.setdefault(made.key, made)
        return self._made.setdefault((made.key, made.dtype, start), made)

    def _called(self, function: Any, args: Any) -> Any:
        """Return the value of a call: a maker's, or a stand-in."""
        if not isinstance(args, (tuple, list)) or not isinstance(function, (Named, Inert)):
            raise pickle.UnpicklingError("a call of what is no function")
        self._budget.step(len(args))
        if isinstance(function, Inert):
            return Inert(function.path)
        if function.path in MAKERS:
            return MAKERS[function.path](self, *args)
        if function.path == "torch._tensor._rebuild_from_type_v2":
            return self._called(args[0], args[2])
        if function.path == "copyreg._reconstructor":
            return self._called(args[0], ())
        return Inert(function.path)

    def copied(self, values: Any) -> Any:
        """Return a container or text after counting its length; refuse a number, which would ask for so many items."""
        if not isinstance(values, (str, bytes, bytearray, list, tuple, dict, set, frozenset)):
            raise pickle.UnpicklingError("a container made of what is none")
        pay = self._budget.copy if isinstance(values, (str, bytes, bytearray)) else self._budget.step
        pay(len(values))
        return values

    def as_set(self, values: Iterable[Any] = ()) -> set[Any]:
        """Return a set of values, each as a key."""
        return set(map(self._key, self.copied(values)))

    def as_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        """Return a dict made from another one, or from pairs."""
        pairs = self.copied(pairs)
        return dict(pairs) if isinstance(pairs, dict) else {self._key(key): value for key, value in pairs}

    def _key(self, value: Any) -> Any:
        """Return a key for a dict or set whose hash is quick and that a file cannot make collide with others."""
        return value if _is_key(value) else Key(self._text(value))

    def _text(self, value: Any) -> str:
        """Return the text of a tuple of keys, a frozen set or a large number; a shared part counts each time."""
        texts: list[str] = []
        left, room = [value], LONGEST
        while left:
            part = left.pop()
            if isinstance(part, (tuple, frozenset)) and len(part) < _PARTS:
                texts.append(f"{type(part).__name__} of {len(part)}:")
                left += part
            elif isinstance(part, (int, complex)):
                texts.append(hex(part) if isinstance(part, int) else str(part))
            elif _is_key(part):
                texts.append(repr(part))
            else:
                raise pickle.UnpicklingError("a key that is none")
            room -= len(texts[-1])
            if room < 0 or len(texts) > _PARTS:
                raise pickle.UnpicklingError("a key without end")
        self._budget.step(len(texts))
        self._budget.copy(LONGEST - room)
        return " ".join(texts)

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], args)

    def _new(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.append(self._called(cls, args))

    def _new_ex(self) -> None:
        self.stack.pop()
        self._new()

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._called(klass, args))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):  # attributes, those in slots as well
            for part in self.copied(state) if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    target.state |= self.copied(part)
        elif isinstance(target, Array):
            *head, data = state
            if not isinstance(data, bytes):
                data = bytes(bytearray_of(self, data))
            target.build((*head, data))
        elif isinstance(target, Kind):
            target.build(state)  # attributes of anything else (a dict's metadata, a parameter's) are let go

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.state if isinstance(target, Inert) else target
        if not isinstance(entries, dict) or len(items) % 2:
            raise pickle.UnpicklingError("entries of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            entries[self._key(key)] = value

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_some(self) -> None:
        self._set(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _add(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if isinstance(target, Inert):
            target.extend(items)
        elif isinstance(target, set):
            target |= self.as_set(items)
        else:
            raise pickle.UnpicklingError("members of what is no set")

    def _frozen(self) -> None:
        self.append(frozenset(self.as_set(self.pop_mark())))

    def _bytearray(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _put(self) -> None:
        place = int(self.readline()[:-1])
        if not 0 <= place < _MEMO:
            raise pickle.UnpicklingError("a place in its memory that is none")
        self.memo[place] = self.stack[-1]

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has names by number, or parts that were sent along")

    dispatch: Any = MappingProxyType(
        {
            **_Python.dispatch,
            **{pickle.REDUCE[0]: _reduce, pickle.NEWOBJ[0]: _new, pickle.NEWOBJ_EX[0]: _new_ex},
            **{pickle.BUILD[0]: _build, pickle.PUT[0]: _put, pickle.BYTEARRAY8[0]: _bytearray},
            **{pickle.SETITEM[0]: _set_one, pickle.SETITEMS[0]: _set_some, pickle.DICT[0]: _dict},
            **{pickle.ADDITEMS[0]: _add, pickle.FROZENSET[0]: _frozen},
            **dict.fromkeys((pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0]), _refuse),
            **dict.fromkeys((pickle.NEXT_BUFFER[0], pickle.READONLY_BUFFER[0]), _refuse),
        }
    )


_KEYS = (float, Named, Inert, Key, Storage, Stored, Array, Kind, torch.dtype)
_CALLS = (pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST)
_COSTS = dict.fromkeys((opcode[0] for opcode in (*_CALLS, pickle.EMPTY_SET, pickle.FROZENSET)), 3)  # in memory


def _is_key(value: Any) -> bool:
    if isinstance(value, (str, bytes)):
        return len(value) <= LONGEST
    if isinstance(value, int):
        return abs(value) < _SMALL
    return value is None or isinstance(value, _KEYS)


def _storage_type(path: str) -> torch.dtype | None:
    """The type of a storage class; None for one without a type, and for what is no storage class."""
    found = re.fullmatch(r"torch\.(?:cuda\.)?(\w+)Storage", path)
    return _STORAGES.get(found[1]) if found else None
