"""The files that torch pickles into: zip archives, TorchScript among them, and the flat files of torch < 1.6."""

import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from adamerge.convert.budget import Budget
from adamerge.convert.pickles import Reader
from adamerge.reading import open_regular
from adamerge.types import InputError

_MAGIC = 0x1950A86A20F9469CFC6C
_HOSTILE = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "pty", "socket", "shutil", "runpy", "importlib", "ctypes"}
    | {"webbrowser", "urllib", "requests", "multiprocessing", "asyncio", "pickle", "marshal"}
)  # modules
_RUNNING = frozenset(f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__", "open", "input"))
_OTHER_TENSORS = ("torch._utils._rebuild", "torch.storage._load_from_bytes")


class Content(NamedTuple):
    """The content of a pickled checkpoint, as data."""

    value: Any
    script: bool  # a TorchScript archive


@contextmanager
def opened(path: Path, *, modules: bool) -> Iterator[Content]:
    """A pickled checkpoint, whose tensors are read inside the block.

    Args:
        path: The file.
        modules: Let inert stand-ins take the place of what is no plain data; else such a file is refused.

    Raises:
        InputError: Damaged, no pickle of torch, no regular file, one that names other things than plain data and
            tensors, or that asks for more steps or memory than a checkpoint needs.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    with file:
        with _explained(path):
            whole = _Whole(file, os.fstat(file.fileno()).st_size)
            is_zip = zipfile.is_zipfile(whole)
            whole.seek(0)
            content = _of_zip(whole, path, modules) if is_zip else _of_flat(whole, path, modules)
        yield content


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise InputError(_damaged(path, error)) from error


class _Whole(io.BufferedIOBase):
    """A file of known size, which never takes memory for more bytes than it has, whatever number is asked for."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size = file, size

    def read(self, number: int | None = -1) -> bytes:
        there = max(0, self.size - self._file.tell())
        return self._file.read(there if number is None or number < 0 else min(number, there))

    def readline(self, number: int | None = -1) -> bytes:
        return self._file.readline(-1 if number is None else number)

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


class _Members:
    """The storages of a zip archive, each a member of its own; the last one is kept, as tensors often share one."""

    def __init__(self, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        self._archive, self._root, self._path = archive, root, path
        self._last: tuple[str, bytearray] | None = None

    def size(self, key: str) -> int:
        return self._archive.getinfo(f"{self._root}data/{key}").file_size

    def read(self, key: str) -> bytearray:
        if self._last is None or self._last[0] != key:
            with _explained(self._path):
                self._last = key, bytearray(self._archive.read(f"{self._root}data/{key}"))  # checksum is checked
        return self._last[1]


def _of_zip(file: _Whole, path: Path, modules: bool) -> Content:
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    main = [name for name in members if name.count("/") <= 1 and name.rpartition("/")[2] == "data.pkl"]
    if len(main) != 1:
        raise InputError(f"{path} is a zip archive, but not one that torch wrote: it has no data.pkl.")
    root = main[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    _check_members(path, [i for i in archive.infolist() if i.filename.startswith((f"{root}data", order))], file.size)
    if order in members and archive.read(order) != b"little":
        raise InputError(f"{path} was written on a machine of the other byte order; save it again on this one.")
    script = f"{root}constants.pkl" in members
    pickled = io.BytesIO(archive.read(main[0]))
    reader = Reader(pickled, _Members(archive, root, path), Budget(str(path), file.size))
    value = _loaded(reader, path)
    for key in reader.storages:
        if f"{root}data/{key}" not in members:
            raise InputError(_damaged(path, f"the storage '{key}' is missing"))
    _check_names(path, [name for name in reader.unknown if not (script and name.startswith("__torch__."))], modules)
    return Content(value, script)


def _check_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse members whose sizes are not those of the bytes that they have in the archive, before any is read."""
    if any(info.compress_type != zipfile.ZIP_STORED for info in members):
        raise InputError(f"{path} is compressed, as torch never writes it; unpack it, or save it again with torch.")
    if any(info.flag_bits & 1 for info in members):
        raise InputError(f"{path} is encrypted, as torch never writes it; decrypt it first.")
    if len({info.filename for info in members}) < len(members):
        raise InputError(_damaged(path, "it has two members of one name"))
    end = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        if info.file_size != info.compress_size or info.header_offset < end:
            raise InputError(_damaged(path, f"the size or place of its member '{info.filename}' cannot be"))
        end = info.header_offset + 30 + info.file_size  # 30: the smallest header
    if end > size:
        raise InputError(_damaged(path, "its members are longer than the file"))


class _Places:
    """The storages of a flat file, by where their bytes begin and how many there are."""

    def __init__(self, file: _Whole) -> None:
        self._file = file
        self._last: tuple[str, bytearray] | None = None
        self.of: dict[str, tuple[int, int]] = {}

    def size(self, key: str) -> int:
        return self.of[key][1]

    def read(self, key: str) -> bytearray:
        if self._last is None or self._last[0] != key:
            start, length = self.of[key]
            self._file.seek(start)
            self._last = key, bytearray(self._file.read(length))
        return self._last[1]


def _of_flat(file: _Whole, path: Path, modules: bool) -> Content:
    """Files of torch < 1.6 (header, pickle, keys, bytes of the storages in the order of the keys), or one pickle."""
    first = file.read(265)
    if first[257:262] == b"ustar" or first[:4] == b"PK\3\4":
        reason = "a tar archive of torch < 0.2" if first[:1] != b"P" else "a zip archive that is cut short"
        raise InputError(f"{path} is {reason}, which is not read; copy it again, or save it again with torch.")
    file.seek(0)
    places, budget = _Places(file), Budget(str(path), file.size)

    def pickled() -> tuple[Reader, Any]:
        reader = Reader(file, places, budget)
        return reader, _loaded(reader, path)

    head, value = pickled()
    if value != _MAGIC:
        _check_names(path, head.unknown, modules)
        if head.storages:
            raise InputError(_damaged(path, "it names storages, and has none"))
        return Content(value, False)
    _, (_, system) = pickled(), pickled()
    if not isinstance(system, Mapping) or system.get("little_endian") is not True:
        raise InputError(f"{path} was written on a machine of the other byte order; save it again on this one.")
    (reader, value), (_, keys) = pickled(), pickled()
    end = file.tell()
    for key in keys if isinstance(keys, list) else ():
        known = reader.storages.get(str(key)) if isinstance(key, (str, int)) else None
        if known is None or known.dtype is None:
            raise InputError(_damaged(path, "nothing is known of one of its storages"))
        file.seek(end)
        length = int.from_bytes(file.read(8), "little") * known.dtype.itemsize
        places.of[known.key] = (end + 8, length)
        end += 8 + length
        if end > file.size:
            raise InputError(_damaged(path, "it ends too early"))
    missing = [key for key in reader.storages if key not in places.of]
    if missing:
        raise InputError(_damaged(path, f"the storage '{missing[0]}' is missing"))
    _check_names(path, reader.unknown, modules)
    return Content(value, False)


def _loaded(reader: Reader, path: Path) -> Any:
    try:
        return reader.load()
    except Exception as error:  # a damaged pickle can fail in any way
        if reader.unknown:
            _check_names(path, reader.unknown, modules=False)
        if isinstance(error, InputError):
            raise
        raise InputError(_damaged(path, error)) from error


def _damaged(path: Path, reason: object) -> str:
    said = str(reason) or type(reason).__name__
    return (
        f"{path} is damaged, or no checkpoint of torch ({said}); compare its size with the original and copy it again."
    )


def _check_names(path: Path, unknown: Mapping[str, None] | list[str], modules: bool) -> None:
    names = sorted(unknown)
    hostile = [n for n in names if n.partition(".")[0] in _HOSTILE or n in _RUNNING]
    if hostile:
        raise InputError(
            f"{path} asks for {', '.join(hostile)}, which no model needs and which can run anything: it looks like an "
            "attack. Nothing of it was run, and it is not converted; get the checkpoint from somewhere else."
        )
    tensors = [name for name in names if name.startswith(_OTHER_TENSORS)]
    if tensors:
        raise InputError(
            f"{path} holds sparse, quantised or otherwise special tensors ({', '.join(tensors)}), which are not "
            "converted; save its plain `state_dict()` again."
        )
    if names and not modules:
        names.sort(key=lambda name: name.startswith(("torch.", "builtins.")))  # what is foreign first
        listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        raise InputError(
            f"{path} holds more than tensors and plain data; its pickle names {len(names)} ({listed}). None of it was "
            "imported or run. To take the tensors out and leave these objects behind, pass modules=True (in a command: "
            "--modules)."
        )
