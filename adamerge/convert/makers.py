"""The few calls of a pickle that make something: plain containers, tensors that stay in their file, arrays of numpy.

Each maker takes the reader, which counts what is copied, and the arguments, which can be anything.
"""

import pickle
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from adamerge.convert.parts import Array, Inert, Kind, Storage, Stored, sizes

_PLAIN = re.compile(r"[<>|=]?(b1|[iufc][0-9]{1,2})")  # numpy types without objects
LONGEST = 4096  # letters of a name or key


def is_place(value: Any) -> bool:
    """Tell whether a value can count elements or bytes."""
    return isinstance(value, int) and 0 <= value < 2**63


def bytearray_of(reader: Any, content: Any = b"", encoding: Any = "latin1") -> bytearray:
    """Return bytes or text as a bytearray; a number does not give that many zeros, as it does in Python."""
    if isinstance(content, (bytes, bytearray)):
        return bytearray(reader.copied(content))
    return bytearray(_encoded(reader, content, encoding))


def _tensor(reader: Any, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Stored:
    if not isinstance(storage, Storage) or not is_place(offset):
        raise pickle.UnpicklingError("a tensor without a storage")
    dtype = next((value for value in rest[2:3] if isinstance(value, torch.dtype)), None) or storage.dtype
    if dtype is None:
        raise pickle.UnpicklingError("a tensor without a type")
    return Stored(storage, dtype, offset, sizes(size), sizes(stride))


def _encoded(reader: Any, text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise pickle.UnpicklingError("bytes that are none")
    return bytes(reader.copied(text).encode(encoding))


def _complex(reader: Any, *parts: Any) -> complex:
    if not all(isinstance(part, (int, float)) for part in parts):
        raise pickle.UnpicklingError("a complex number that is none")
    return complex(*parts)


def _kind(reader: Any, name: Any, *rest: Any) -> Any:
    """Return a plain type of numpy; a stand-in for any other type."""
    if not isinstance(name, str) or len(name) > LONGEST:
        raise pickle.UnpicklingError("a type of numpy without a name")
    if _PLAIN.fullmatch(name):
        return Kind(np.dtype(name))
    reader.unknown[f"numpy.dtype('{name}')"] = None
    return Inert("numpy.dtype")


def _first(reader: Any, value: Any, *rest: Any) -> Any:
    return value


_REBUILD = "torch._utils._rebuild_"
MAKERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("collections.OrderedDict", "collections.Counter", "builtins.dict"),
            lambda reader, *args: reader.as_dict(*args),
        ),
        "collections.defaultdict": lambda reader, *args: {},
        **{
            "builtins.set": lambda reader, *args: reader.as_set(*args),
            "builtins.frozenset": lambda reader, *args: frozenset(reader.as_set(*args)),
        },
        "builtins.list": lambda reader, *args: list(*map(reader.copied, args)),
        "builtins.tuple": lambda reader, *args: tuple(*map(reader.copied, args)),
        **{"builtins.complex": _complex, "builtins.bytearray": bytearray_of},
        "torch.Size": lambda reader, *args: tuple(*map(reader.copied, args)),
        "torch.device": lambda reader, *args: args,
        **{"torch.serialization._get_layout": _first, "_codecs.encode": _encoded, "numpy.dtype": _kind},
        **{f"{_REBUILD}tensor{version}": _tensor for version in ("", "_v2", "_v3")},
        **{f"{_REBUILD}parameter{kind}": _first for kind in ("", "_with_state")},
        **{f"torch.{name}": _first for name in ("nn.parameter.Parameter", "nn.parameter.Buffer")},
        **{f"numpy.{home}.multiarray._reconstruct": lambda reader, *args: Array() for home in ("core", "_core")},
        **{f"numpy.{home}.multiarray.scalar": _first for home in ("core", "_core")},
        **{f"torch.jit._pickle.{name}": _first for name in ("restore_type_tag", "build_tensorlist", "build_intlist")},
        **{f"torch.jit._pickle.{name}": _first for name in ("build_doublelist", "build_boollist")},
    }
)
KNOWN = frozenset(
    {
        *MAKERS,
        *(f"builtins.{name}" for name in ("int", "float", "bool", "str", "bytes", "object")),
        *("torch.storage.UntypedStorage", "torch.UntypedStorage", "torch.Tensor"),
        *("numpy.ndarray", "copyreg._reconstructor"),
        "torch._tensor._rebuild_from_type_v2",
    }
)
