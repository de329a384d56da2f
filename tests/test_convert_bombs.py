"""Small files that ask for time or memory without bound are refused in a sentence, in seconds and in little memory."""

import io
import multiprocessing
import os
import pickle
import re
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adamerge.convert import convert
from adamerge.types import InputError

SECONDS, MEMORY = 60, 2**30  # of a bomb; a slow machine with other work takes its time


def _enter(pipe, call):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        said = call()
    except InputError as error:
        said = str(error)
    except BaseException as error:  # a test that fails says what came instead
        said = f"{type(error).__name__}, which is no InputError: {error}"
    pipe.send((said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


def bounded(call, memory=400 * 2**20):
    """The message that a call ends with, in a process that is ended when it takes too long or too much memory."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_enter, args=(there, call))
    process.start()
    there.close()
    try:
        assert here.poll(SECONDS), f"no end after {SECONDS} seconds"
        said, taken = here.recv()
    finally:
        process.kill()
        process.join()
    assert taken < memory, f"{taken / 2**20:.0f} MiB"
    return said


# --- pickles, piece by piece


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def text(value):
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(path):
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def called(path, *args):
    return named(path) + b"(" + b"".join(args) + b"tR"


def several(*values):
    return b"(" + b"".join(values) + b"t"


def tensor(shape=(1,), stride=(1,), offset=0, key="0", kind="Float"):
    stored = several(text("storage"), named(f"torch.{kind}Storage"), text(key), text("cpu"), number(16)) + b"Q"
    sizes, strides = (several(*map(number, each)) for each in (shape, stride))
    return called("torch._utils._rebuild_tensor_v2", stored, number(offset), sizes, strides, b"\x89", b"N")


def state(**tensors):
    return b"}(" + b"".join(text(name) + value for name, value in tensors.items()) + b"u"


def get(place):
    return b"j" + struct.pack("<I", place)


def put(place):
    return b"r" + struct.pack("<I", place)


WEIGHT = text("w") + tensor()
BIG = "x" * 1_000_000


def doubled(levels, pair, first=b"K\1\x85"):
    """A value that holds the one before it twice, and so on: 2 ** levels parts for whoever walks it as a tree."""
    steps = [get(level) + get(level) + pair + put(level + 1) for level in range(levels)]
    return first + put(0) + b"".join(steps)


def module(parameters=b"}", modules=b"}"):
    fields = text("_parameters") + parameters + text("_modules") + modules
    return named("foreign.M") + b")\x81}(" + fields + b"ub"


def modules_doubled(levels, *, script):
    """Modules that hold the same one twice: a name for each of 2 ** levels ways to one tensor."""

    def one(fields):
        return named("__torch__.M") + b")\x81}(" + fields + b"ub" if script else module(b"}", b"}(" + fields + b"u")

    inner = one(WEIGHT) if script else module(b"}(" + WEIGHT + b"u")
    pairs = [one(text("a") + get(level) + text("b") + get(level)) + put(level + 1) for level in range(levels)]
    return inner + put(0) + b"".join(pairs)


def modules_nested(levels):
    code = module(b"}(" + WEIGHT + b"u")
    for _ in range(levels):
        code = module(b"}", b"}(" + text("a") + code + b"u")
    return code


def array(shape, data=b"\0" * 8, kind="f4"):
    """An array of numpy, of any shape and bytes."""
    made = called("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), several(number(0)), text("b"))
    dtype = called("numpy.dtype", text(kind), b"\x89", b"\x88")
    raw = b"B" + struct.pack("<I", len(data)) + data
    return made + several(number(1), several(*map(number, shape)), dtype, b"\x89", raw) + b"b"


LEFT = r"(is damaged, or no checkpoint|is damaged: its tensors cannot be read)"
MUCH = r"asks for more than .* (steps to read|MB of names and copies)"
GROWN = r"has 0.0 MB, but its tensors would take [\d,.]+ MB"
PICKLES = {
    "a view of one value": (state(w=tensor((30000, 25000), (0, 0))), GROWN),
    "many such views": (
        state(**{f"w{each}": tensor((5000, 25000), (0, 0)) for each in range(40)}),
        GROWN,
    ),
    "a view of petabytes": (state(w=tensor((2**50,), (0,))), GROWN),
    "a view of more bytes than a number has": (state(w=tensor((2**62,) * 30, (0,) * 30)), GROWN),
    "windows of overlapping values": (state(w=tensor((9,) * 8, (1,) + (0,) * 7)), GROWN),
    "one tensor under many names": (
        b"}(" + text("w") + tensor((4, 2**20), (1, 0)) + put(0) + b"".join(text(n) + get(0) for n in "abcdefg") + b"u",
        GROWN,
    ),
    "offset beyond the storage": (state(w=tensor(offset=16)), LEFT),
    "offset of 2**63 - 1": (state(w=tensor(offset=2**63 - 1)), LEFT),
    "offset below zero": (state(w=tensor(offset=-1)), LEFT),
    "stride beyond the storage": (state(w=tensor((2, 2), (2**62, 2**62))), LEFT),
    "stride below zero": (state(w=tensor((2,), (-1,))), LEFT),
    "fewer strides than sizes": (state(w=tensor((2, 2), (1,))), LEFT),
    "a thousand dimensions": (state(w=tensor((1,) * 1000, (1,) * 1000)), LEFT),
    "nothing of a size beyond 64 bits": (state(w=tensor((0, 2**62, 2**62), (1, 1, 1))), LEFT),
    "no storage": (state(w=called("torch._utils._rebuild_tensor_v2", b"N", b"K\0", b")", b")", b"\x89", b"N")), LEFT),
    "an array with too few bytes": (state(w=array((1000, 1000))), LEFT),
    "an array of petabytes": (state(w=array((2**31, 2**31))), LEFT),
    "an array below zero": (state(w=array((-2, -1))), LEFT),
    "an array of objects": (state(w=array((1,), kind="O8")), r"names 1 \(numpy.dtype\('O8'\)\)"),
    "an array never filled": (
        state(w=called("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), b")", b"N")),
        LEFT,
    ),
    "bytearray of a number": (called("builtins.bytearray", number(600_000_000)), LEFT),
    "a list of numbers as bytes": (called("builtins.bytearray", b"]"), LEFT),
    "a list of a number": (called("builtins.list", number(2**40)), LEFT),
    "a size of a number": (called("torch.Size", number(2**40)), LEFT),
    "a set of a number": (called("builtins.set", number(2**40)), LEFT),
    "a text encoded many times": (
        text(BIG) + put(0) + b"0(" + (called("_codecs.encode", get(0), text("latin1"))) * 5000 + b"l",
        MUCH,
    ),
    "a text as many bytearrays": (
        text(BIG) + put(0) + b"0(" + called("builtins.bytearray", get(0), text("latin1")) * 5000 + b"l",
        MUCH,
    ),
    "a list copied many times": (
        b"(" + b"N" * 500_000 + b"l" + put(0) + b"0(" + called("builtins.list", get(0)) * 5000 + b"l",
        MUCH,
    ),
    "a list as a tuple, many times": (
        b"(" + b"N" * 500_000 + b"l" + put(0) + b"0(" + called("torch.Size", get(0)) * 5000 + b"l",
        MUCH,
    ),
    "a tuple of arguments used many times": (
        b"(" + b"N" * 500_000 + b"t" + put(0) + b"0(" + (named("torch.device") + get(0) + b"R") * 5000 + b"l",
        MUCH,
    ),
    "many empty sets": (b"(" + b"\x8f" * 3_000_000 + b"l", MUCH),
    "many small steps": (b"(" + b"N0" * 3_000_000 + b"l", MUCH),
    "a key of shared tuples": (b"}" + doubled(40, b"\x86") + b"K\1s", LEFT),
    "a set of shared tuples": (named("builtins.set") + b"](" + doubled(40, b"\x86") + b"e\x85R", LEFT),
    "members of shared tuples": (b"\x8f(" + doubled(40, b"\x86") + b"\x90", LEFT),
    "a frozen set of shared tuples": (b"(" + doubled(40, b"\x86") + b"\x91", LEFT),
    "a key of a million letters": (b"}" + text(BIG) + b"K\1s", LEFT),
    "a storage whose key is a shared list": (
        b"(" + text("storage") + named("torch.FloatStorage") + doubled(40, b"\x86l"[:1]) + text("cpu") + b"K\1tQ",
        LEFT,
    ),
    "a numpy type called by a shared tuple": (named("numpy.dtype") + doubled(40, b"\x86") + b"\x85R", LEFT),
    "a name of a million letters": (f"cfoo\n{BIG}\n".encode() + text("a"), LEFT),
    "a text that says 4 GB": (b"X\xff\xff\xff\xff", LEFT),
    "a text that says 2**60 bytes": (b"\x8d" + struct.pack("<Q", 2**60), LEFT),
    "bytes that say 2**60": (b"\x8e" + struct.pack("<Q", 2**60), LEFT),
    "a bytearray that says 2 GB": (b"\x96" + struct.pack("<Q", 2**31), LEFT),
    "a bytearray that says 2**60": (b"\x96" + struct.pack("<Q", 2**60), LEFT),
    "a frame of 2**60 bytes": (b"\x95" + struct.pack("<Q", 2**60) + b"N", "holds no named tensors"),
    "a number of 2 GB": (b"\x8b" + struct.pack("<i", 2**31 - 1), LEFT),
    "a number of four million digits": (b"L" + b"9" * 4_000_000 + b"L\n", LEFT),
    "a place beyond its memory": (b"Np" + b"9" * 4000 + b"\n", LEFT),
    "a list in 200,000 lists": (b"]" * 200_000 + b"a" * 199_999, "holds no named tensors"),
    "a tensor in 200,000 lists": (
        b"}" + text("x") + b"]" * 200_000 + tensor() + b"a" * 200_000 + b"s",
        r"holds (no named tensors in x|parts that are nested)",
    ),
    "a dict in 200,000 dicts": (
        b"}" + (text("model") + b"}") * 100_000 + WEIGHT + b"s" + b"s" * 100_000,
        "nested more than 100 deep",
    ),
    "a dict in itself": (b"}" + put(0) + text("model") + get(0) + b"s", "holds no named tensors"),
    "a dict with a tensor in itself": (
        b"}" + put(0) + b"(" + text("model") + get(0) + text("x") + b"}(" + WEIGHT + b"uu",
        "nested more than 100 deep, or in themselves",
    ),
    "modules in 500 modules": (modules_nested(500), "nested more than 100 deep"),
    "shared modules": (modules_doubled(40, script=False), MUCH),
    "two modules of one name": (
        module(b"}", b"}(" + text("a.b") + module(b"}(" + WEIGHT + b"u") + text("a")
        + module(b"}", b"}(" + text("b") + module(b"}(" + WEIGHT + b"u") + b"u") + b"u"),
        r"two tensors that would be called 'a.b.w'",
    ),
    "half a letter in a name": (state(**{"\ud800": tensor()}), r"names are not written: 1 \(\\ud800\)"),
    "the name of safetensors' own entry": (state(__metadata__=tensor()), r"names are not written: 1 \(__metadata__\)"),
    "names that are no text": (b"}(K\1" + tensor() + b"u", "holds no named tensors"),
}  # fmt: skip


def archive(code, storage=b"\0" * 64, *, packed=(), **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("archive/data.pkl", code)
        new.writestr("archive/data/0", storage, zipfile.ZIP_DEFLATED if "0" in packed else zipfile.ZIP_STORED)
        for name, content in members.items():
            new.writestr(f"archive/{name}", content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def converted(folder, content, name="a.pt"):
    (folder / name).write_bytes(content)
    return bounded(lambda: f"converted {convert(folder / name, folder / 'out' / 'a.safetensors', modules=True)}")


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(tmp_path, name):
    code, message = PICKLES[name]
    said = converted(tmp_path, archive(b"\x80\x02" + code + b"."))
    assert re.search(message, said), said
    assert "\n\n" not in said
    assert [file.name for file in tmp_path.iterdir() if file.name != "out"] == ["a.pt"]
    assert not list((tmp_path / "out").glob("*"))


def test_shared_modules_of_torchscript(tmp_path):
    code = b"\x80\x02" + modules_doubled(40, script=True) + b"."
    assert "MB of names and copies" in converted(tmp_path, archive(code, **{"constants.pkl": b"x"}))


def test_lists_that_share_their_parts_beside_a_tensor(tmp_path):
    code = b"\x80\x02" + doubled(60, b"\x86", b"]") + put(99) + b"0}(" + WEIGHT + text("x") + get(99) + b"u."
    assert converted(tmp_path, archive(code)).startswith("converted Converted 1 tensors")


def test_keys_whose_hashes_are_alike(tmp_path):
    """Numbers, complex numbers and tuples that Python gives one hash."""
    alike = [several(*(number(-1 - (each >> bit & 1)) for bit in range(15))) for each in range(2**15)]
    numbers = [b"\x8a\x0a" + (each * (2**61 - 1)).to_bytes(10, "little", signed=True) for each in range(1, 2**15)]
    for keys in (alike, numbers):
        code = b"\x80\x02}(" + WEIGHT + text("x") + b"}(" + b"".join(key + b"N" for key in keys) + b"uu."
        assert converted(tmp_path, archive(code)).startswith("converted Converted 1 tensors")
        (tmp_path / "out" / "a.safetensors").unlink(missing_ok=True)


# --- archives


def edited(content, mark, offset, value, width=2):
    """An archive with another number at an offset from the first or, of the end, the last of a kind of header."""
    place = content.rindex(mark) if mark == b"PK\5\6" else content.index(mark)
    return content[: place + offset] + value.to_bytes(width, "little") + content[place + offset + width :]


GOOD = b"\x80\x02" + state(w=tensor()) + b"."


def twice(code):
    """An archive whose second storage has got the name of the first."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name in ("data.pkl", "data/0", "data/1"):
            new.writestr(f"archive/{name}", code if name == "data.pkl" else b"\0" * 64)
    return file.getvalue().replace(b"data/1", b"data/0")


def overlapping():
    """A hundred members that all lie at the same place."""
    content = archive(GOOD, b"\0" * 2**20)
    directory = content.index(b"PK\1\2")
    end = content.rindex(b"PK\5\6")
    entries = content[directory:end]
    second = entries[entries.index(b"PK\1\2", 4) :]
    many = entries + b"".join(second.replace(b"data/0", f"data/{each % 10}".encode()) for each in range(1, 10))
    tail = bytearray(content[end:])
    tail[8:16] = struct.pack("<HHI", 11, 11, len(many))
    return content[:directory] + many + bytes(tail)


ARCHIVES = {
    "a storage that unpacks to more": (lambda: archive(GOOD, b"\0" * 10**8, packed=("0",)), "is compressed"),
    "a byte order that unpacks to more": (lambda: archive(GOOD, byteorder=b"\0" * 10**8), "is compressed"),
    "two members of one name": (lambda: twice(GOOD), "two members of one name"),
    "members at one place": (overlapping, "size or place of its member"),
    "an encrypted member": (lambda: edited(archive(GOOD), b"PK\1\2", 8, 1), "is encrypted"),
    "an unknown compression": (lambda: edited(archive(GOOD), b"PK\1\2", 10, 99), "is compressed"),
    "a later version": (lambda: edited(archive(GOOD), b"PK\1\2", 6, 99), r"zip file version 9.9"),
    "a member of 4 GB": (lambda: edited(archive(GOOD), b"PK\1\2", 24, 2**32 - 2, 4), "size or place of its member"),
    "a directory of 4 GB": (lambda: edited(archive(GOOD), b"PK\5\6", 12, 2**32 - 2, 4), LEFT),
    "a directory far away": (lambda: edited(archive(GOOD), b"PK\5\6", 16, 2**31, 4), LEFT),
    "a directory at no place": (lambda: edited(archive(GOOD), b"PK\5\6", 16, 2**32 - 2, 4), LEFT),
    "a name that is no UTF-8": (
        lambda: edited(edited(archive(GOOD), b"PK\1\2", 8, 2**11), b"PK\1\2", 46, 0xFF, 1),
        LEFT,
    ),
    "a pickle that is missing": (lambda: edited(archive(GOOD), b"PK\1\2", 46, 0x2E, 1), "it has no data.pkl|" + LEFT),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tmp_path, name):
    make, message = ARCHIVES[name]
    said = converted(tmp_path, make())
    assert re.search(message, said), said


def test_many_members(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("archive/data.pkl", GOOD)
        for each in range(20_000):
            new.writestr(f"archive/data/{each}", b"\0" * 64 if not each else b"")
    assert converted(tmp_path, file.getvalue()).startswith("converted Converted 1 tensors")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_flat_pickles(tmp_path, protocol):
    nested: list = []
    for _ in range(300):
        nested = [nested]
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"w": np.ones(2), "x": nested}, protocol))
    assert convert(tmp_path / "b.pkl", tmp_path / "b.safetensors").tensors == 1
    for code, message in (
        (called("builtins.bytearray", number(600_000_000)), LEFT),
        (b"X\xff\xff\xff\xff", LEFT),
        (state(w=tensor()), "names storages, and has none"),
    ):
        said = converted(tmp_path, b"\x80\x02" + code + b".", "a.bin")
        assert re.search(message, said), said


def test_storages_by_turns_are_each_read_once(tmp_path):
    one, two = torch.arange(250_000.0), torch.arange(250_000.0)
    by_turns = {f"{name}{n}": whole[n : n + 1] for n in range(2000) for name, whole in (("a", one), ("b", two))}
    torch.save(by_turns, tmp_path / "a.pt")
    said = bounded(lambda: str(convert(tmp_path / "a.pt", tmp_path / "a.safetensors")))
    assert said.startswith("Converted 4000 tensors")
    assert load_file(tmp_path / "a.safetensors")["b7"].tolist() == [7.0]


# --- places


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for name, message in {
        "pipe.pt": "is a folder, pipe, socket or device",
        "zero.pt": "is a folder, pipe, socket or device",
        "gone.pt": "There is no checkpoint at",
        "loop.pt": "There is no checkpoint at",
        "a\0.pt": "There is no checkpoint at",
        "a" * 300 + ".pt": "There is no checkpoint at",
    }.items():
        said = bounded(lambda name=name: str(convert(tmp_path / name, tmp_path / "a.safetensors")))
        assert message in said, said


def test_places_that_cannot_be_written(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "a.pt")
    for out, message in {
        "file/a.safetensors": "cannot be written",
        "a" * 300 + ".safetensors": "cannot be written",
        "link.safetensors": "exists already|is a file: give a name",
    }.items():
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "a.pt", tmp_path / out)
    with pytest.raises(InputError, match="is no name of a file"):
        convert(tmp_path / "a.pt", tmp_path / "a\0.safetensors")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt", "file", "link.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{", "is no UTF-8 text"),
        (b"[" * 100_000, "is no JSON|nested"),
        (b'{"weight_map": ' + b"[" * 500 + b"]" * 500 + b"}", "nested more than"),
        (b'{"weight_map": {"a": 1}}', "is no index of shards"),
        (b'{"weight_map": {"a": ["a.bin"]}}', "is no index of shards"),
        (b'{"weight_map": {}}', "is no index of shards"),
        (b'{"weight_map": {"a": ".."}}', "points outside its folder"),
        (b'{"weight_map": {"a": "."}}', "points outside its folder"),
        (b'{"weight_map": {"a": ""}}', "points outside its folder"),
        (b'{"weight_map": {"a": "/dev/zero"}}', "points outside its folder"),
        (b'{"weight_map": {"a": "' + b"a" * 300 + b'"}}', "which is missing"),
        (b'{"weight_map": {"a": "a\\u0000b"}}', "which is missing"),
        (b'{"weight_map": {"a": "\\ud800"}}', "half a character"),
        (b'{"weight_map": {"a": "pipe"}}', "is a folder, pipe, socket or device"),
        (b'{"weight_map": {"a": "zero"}}', "is a folder, pipe, socket or device"),
        (b'{"weight_map": {"a": "folder"}}', "is a folder, pipe, socket or device"),
        (b'{"weight_map": {"a": "link"}}', "which is missing"),
        (None, "is a folder, pipe, socket or device"),
    ],
)
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_indices_of_shards(tmp_path, kind, content, message):
    from adamerge.checkpoints import open_headers, open_state

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "folder").mkdir()
    if content is not None and b"pipe" in content:  # one in the folder is refused, whoever names it
        os.mkfifo(folder / "pipe")
    if content is not None and b'"zero' in content:
        (folder / "zero").symlink_to("/dev/zero")
    (folder / "link").symlink_to(tmp_path / "nothing")
    index = folder / f"model.{kind}.index.json"
    os.mkfifo(index) if content is None else index.write_bytes(content)
    doors = [lambda: convert(folder, tmp_path / "out")] if kind == "bin" else []
    doors += [] if kind == "bin" else [lambda: open_state(folder), lambda: open_headers(str(folder))]
    for door in doors:
        said = bounded(lambda door=door: str(door()))
        assert re.search(message, said), said


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("target", ["pipe", "zero", "folder"])
def test_weights_that_are_no_file(tmp_path, name, target):
    from adamerge.checkpoints import open_state

    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / name).symlink_to(tmp_path / target)
    said = bounded(lambda: str(open_state(tmp_path / name)))
    assert "is a folder, pipe, socket or device" in said or "holds 0 safetensors files" in said, said


HEADERS = {
    "a length of 2**63": (struct.pack("<Q", 2**63), b"{}"),
    "a length of 4 GB": (struct.pack("<Q", 2**32), b"{}"),
    "a header of many brackets": (None, b'{"a":' + b"[" * 100_000),
    "overlapping tensors": (
        None,
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    ),
    "a type that is none": (None, b'{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}'),
    "a size below zero": (None, b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}'),
    "a size beyond 64 bits": (None, b'{"a":{"dtype":"F32","shape":[0,99999999999999999999],"data_offsets":[0,0]}}'),
    "a size of 64 bits": (None, b'{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'),
    "a type that torch lacks": (None, b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(tmp_path, name):
    from adamerge.checkpoints import open_headers, open_state

    length, header = HEADERS[name]
    (tmp_path / "a.safetensors").write_bytes((length or struct.pack("<Q", len(header))) + header + b"\0" * 12)

    def read():
        state = open_headers(str(tmp_path / "a.safetensors"))
        return [state.meta(each) for each in state]

    def values():
        state = open_state(tmp_path / "a.safetensors")
        return [state[each] for each in state]

    for door in (read, values):
        said = bounded(lambda door=door: str(door()))
        assert "is not a whole safetensors file" in said or "cannot be read" in said or "storage type" in said, said


def test_numbers_beside_the_weights_may_be_many_in_a_large_file(monkeypatch, tmp_path):
    monkeypatch.setattr("adamerge.convert.budget._STEPS", 1000)
    whole = {
        "state_dict": {"w": torch.ones(2)},
        "big": torch.ones(200_000),
        "losses": [float(n) for n in range(50_000)],
    }
    torch.save(whole, tmp_path / "b.pt")
    assert convert(tmp_path / "b.pt", tmp_path / "b.safetensors", key="state_dict").tensors == 1
