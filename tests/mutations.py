"""Strategies that change valid files: bytes, plain data, pickles, archives."""

import io
import json
import pickletools
import struct
import zipfile
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**64 - 1)
TEXTS = (
    *("", " ", ".", "..", "../x", "/etc/hostname", "a/b", "a\0b", "a" * 300, "\u00e9", "\ud800", "\x1b[2J", "a\n\nb"),
    *("None", "nan", "inf", "-1", "1e999", "true", "[", "{", "*a", "&a", "!!python/name:os.getcwd", "os.system"),
    *("adamerge", "adamerge.rules.LayerWise", "adamerge.types.some", "adamerge.rules.Nothing", "<function f>", "F32"),
    *("demo:nothing/x", "tests.tiny.Net", "model.safetensors", "class_path", "init_args", "float32", "2020-01-01"),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], {"": None}, {"a": []}, [1, "a"], "x", 0, -1, 1, 3, 0.5, -0.0),
    *(float("nan"), float("inf"), 1e300, 2**31, 2**63, 2**64, -(2**63), 10**30, *TEXTS),
)
_OPCODES = bytes(ord(opcode.code) for opcode in pickletools.opcodes)


@st.composite
def changed_bytes(draw: st.DrawFn, whole: bytes, most: int = 4) -> bytes:
    """A file with a few places set, cut, repeated, moved or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("flip", "set", "number", "cut", "repeat", "insert", "end", "zero")))
        length = draw(st.sampled_from((1, 2, 4, 8, 16, 64)))
        if kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "number":
            width, number = draw(st.sampled_from((1, 2, 4, 8))), draw(st.sampled_from(NUMBERS))
            order = draw(st.sampled_from(("little", "big")))
            data[place : place + width] = (number % 256**width).to_bytes(width, order)
        elif kind == "cut":
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = data[place : place + length] * draw(st.integers(1, 4))
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "zero":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == "end":
            del data[place:]
    return bytes(data)


@st.composite
def changed_tree(draw: st.DrawFn, whole: Any, most: int = 3) -> Any:
    """Plain data with a few values replaced, removed, renamed, repeated or nested."""
    tree = deepcopy(whole)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(tree))
        if not places:
            return draw(st.sampled_from(ODD))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "wrap", "deep", "swap")))
        if kind == "remove":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(ODD).filter(lambda odd: not isinstance(odd, (list, dict))))] = holder.pop(key)
        elif kind == "wrap":
            holder[key] = draw(st.sampled_from(([holder[key]], {"a": holder[key]}, [holder[key], holder[key]])))
        elif kind == "deep":
            for _ in range(draw(st.sampled_from((20, 200)))):
                holder[key] = [holder[key]]
        elif kind == "swap":
            other, place = places[draw(st.integers(0, len(places) - 1))]
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = deepcopy(other[place])
        else:
            holder[key] = deepcopy(draw(st.sampled_from(ODD)))
    return tree


def _places(tree: Any) -> Any:
    """Every container in plain data with each of its keys."""
    left = [tree]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            left.append(holder[key])


@st.composite
def changed_pickle(draw: st.DrawFn, code: bytes, most: int = 4) -> bytes:
    """A pickle with a few opcodes removed, repeated, moved, replaced, or given other arguments."""
    starts = [place for _, _, place in pickletools.genops(code)]
    steps = [code[start:end] for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    for _ in range(draw(st.integers(1, most))):
        place, other = (draw(st.integers(0, max(0, len(steps) - 1))) for _ in range(2))
        kind = draw(st.sampled_from(("remove", "repeat", "copy", "swap", "opcode", "argument", "new", "byte")))
        if not steps or kind == "new":
            steps.insert(place, draw(st.sampled_from(_NEW)))
        elif kind == "remove":
            del steps[place]
        elif kind == "repeat":
            steps[place:place] = [steps[place]] * draw(st.sampled_from((1, 2, 50)))
        elif kind == "copy":
            steps.insert(place, steps[other])
        elif kind == "swap":
            steps[place], steps[other] = steps[other], steps[place]
        elif kind == "opcode":
            steps[place] = bytes([draw(st.sampled_from(_OPCODES))]) + steps[place][1:]
        elif kind == "argument" and len(steps[place]) > 1:
            width = len(steps[place]) - 1
            steps[place] = steps[place][:1] + (draw(st.sampled_from(NUMBERS)) % 256**width).to_bytes(width, "little")
        elif kind == "byte":
            steps[place] = draw(changed_bytes(steps[place], 1))
    return b"".join(steps)


def _named(*names: str) -> list[bytes]:
    return [f"c{module}\n{name}\n".encode() for module, _, name in (name.rpartition(".") for name in names)]


_NEW = [
    *(b"N", b"}", b"]", b")", b"(", b"0", b"1", b"2", b"t", b"l", b"d", b"R", b"b", b"s", b"u", b"a", b"e", b"Q"),
    *(b"\x81", b"\x92", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"\x97", b"\x98", b"."),
    *(
        b"h\0",
        b"q\0",
        b"h\1",
        b"K\1",
        b"K\0",
        b"J\xff\xff\xff\x7f",
        b"J\0\0\0\x80",
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    ),
    *(b"I99999999999\n", b"L1L\n", b"F1e999\n", b"S'a'\n", b"Va\\ud800\n", b"Pa\n", b"p99999999999\n", b"g0\n"),
    *(
        b"X\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 8,
        b"\x95" + b"\xff" * 8,
        b"\x96" + b"\xff" * 7 + b"\x0f",
        b"\x8b\0\0\0\x7f",
    ),
    *(
        b"X\3\0\0\0\xed\xa0\x80",
        b"C\1\xff",
        b"G\x7f\xf8\0\0\0\0\0\0",
        b"\x8a\1\xff",
        b"X\1\0\0\0w",
        b"X\2\0\0\0..",
        b"\x82\1",
    ),
    *_named("builtins.set", "builtins.list", "builtins.bytearray", "builtins.complex", "builtins.tuple", "torch.Size"),
    *_named("collections.OrderedDict", "collections.Counter", "torch.FloatStorage", "torch.float16", "os.system"),
    *_named("numpy.dtype", "numpy.core.multiarray._reconstruct", "_codecs.encode", "torch._utils._rebuild_tensor_v2"),
    *_named("torch._tensor._rebuild_from_type_v2", "copyreg._reconstructor", "argparse.Namespace", "builtins.range"),
]


def members_of(archive: bytes) -> dict[str, bytes]:
    """The members of a zip archive, by name."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        return {name: old.read(name) for name in old.namelist()}


@st.composite
def changed_zip(draw: st.DrawFn, archive: bytes) -> bytes:
    """An archive of torch: with another pickle, other members, or other bytes anywhere."""
    kind = draw(st.sampled_from(("pickle", "pickle", "pickle", "members", "bytes", "directory")))
    if kind == "bytes":
        return draw(changed_bytes(archive))
    if kind == "directory":
        place = archive.rindex(b"PK\1\2") - draw(st.sampled_from((0, 60, 120)))
        return archive[:place] + draw(changed_bytes(archive[place:]))
    members = members_of(archive)
    main = next(name for name in members if name.endswith("data.pkl"))
    if kind == "pickle":
        members[main] = draw(changed_pickle(members[main]))
    else:
        name = draw(st.sampled_from(sorted(members)))
        members[name] = draw(changed_bytes(members[name]))
        if draw(st.booleans()):
            members[draw(st.sampled_from((name + "x", "archive/data.pkl", "data.pkl", "../x", "/")))] = members.pop(
                name
            )
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as written:
        for name, content in members.items():
            packed = draw(st.integers(0, 30)) == 0
            written.writestr(name, content, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    return new.getvalue()


@st.composite
def changed_json(draw: st.DrawFn, whole: Any) -> bytes:
    """A JSON file with other data, or other bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(json.dumps(whole).encode()))
    return json.dumps(draw(changed_tree(whole)), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def changed_safetensors(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file with another header, which it says the length of or not, or other bytes anywhere."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(whole))
    (length,) = struct.unpack("<Q", whole[:8])
    header = draw(changed_json(json.loads(whole[8 : 8 + length])))
    length = draw(st.sampled_from((len(header), len(header), len(header), len(header), *(abs(n) for n in NUMBERS))))
    return struct.pack("<Q", length) + header + whole[8 + struct.unpack("<Q", whole[:8])[0] :]
