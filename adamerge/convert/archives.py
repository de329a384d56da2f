"""The files that torch pickles into: zip archives, TorchScript among them, and the flat files of torch < 1.6."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from adamerge.convert.pickles import Reader
from adamerge.types import InputError

_MAGIC = 0x1950A86A20F9469CFC6C
_HOSTILE = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "pty", "socket", "shutil", "runpy", "importlib", "ctypes"}
    | {"webbrowser", "urllib", "requests", "multiprocessing", "asyncio", "pickle", "marshal"}
)  # modules
_RUNNING = frozenset(f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__", "open", "input"))
_OTHER_TENSORS = ("torch._utils._rebuild", "torch.storage._load_from_bytes")


class Content(NamedTuple):
    """What a pickled checkpoint holds, as data."""

    value: Any
    script: bool  # a TorchScript archive


@contextmanager
def opened(path: Path, *, modules: bool) -> Iterator[Content]:
    """A pickled checkpoint, whose tensors are read inside the block.

    Args:
        path: The file.
        modules: Let inert stand-ins take the place of what is no plain data; else such a file is refused.

    Raises:
        InputError: Damaged, no pickle of torch, or one that names other things than plain data and tensors.
    """
    with path.open("rb") as file:
        try:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    yield _of_zip(archive, path, modules)
            else:
                file.seek(0)
                yield _of_flat(file, path, modules)
        except (zipfile.BadZipFile, EOFError) as error:  # while its tensors are read as well
            raise InputError(_damaged(path, error)) from error


def _of_zip(archive: zipfile.ZipFile, path: Path, modules: bool) -> Content:
    members = {info.filename: info for info in archive.infolist()}
    main = [name for name in members if name.count("/") <= 1 and name.rpartition("/")[2] == "data.pkl"]
    if len(main) != 1:
        raise InputError(f"{path} is a zip archive, but not one that torch wrote: it has no data.pkl.")
    root = main[0].removesuffix("data.pkl")
    ours = [info for name, info in members.items() if name == main[0] or name.startswith(f"{root}data/")]
    if any(info.compress_type != zipfile.ZIP_STORED for info in ours):
        raise InputError(f"{path} is compressed, as torch never writes it; unpack it, or save it again with torch.")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise InputError(f"{path} was written on a machine of the other byte order; save it again on this one.")

    @lru_cache(maxsize=1)
    def storage(key: str) -> bytearray:
        return bytearray(archive.read(f"{root}data/{key}"))  # compared with its checksum

    script = f"{root}constants.pkl" in members
    with archive.open(main[0]) as file:
        reader = Reader(file, storage)  # type: ignore[arg-type]
        value = _loaded(reader, path)
    for key in reader.storages:
        if f"{root}data/{key}" not in members:
            raise InputError(_damaged(path, f"the storage '{key}' is missing"))
    _check_names(path, [name for name in reader.unknown if not (script and name.startswith("__torch__."))], modules)
    return Content(value, script)


def _of_flat(file: BinaryIO, path: Path, modules: bool) -> Content:
    """Files of torch < 1.6 (header, pickle, keys, bytes of the storages in the order of the keys), or one pickle."""
    places: dict[str, tuple[int, int]] = {}

    @lru_cache(maxsize=1)
    def storage(key: str) -> bytearray:
        start, length = places[key]
        file.seek(start)
        return bytearray(file.read(length))

    first = file.read(265)
    if first[257:262] == b"ustar" or first[:4] == b"PK\3\4":
        reason = "a tar archive of torch < 0.2" if first[:1] != b"P" else "a zip archive that is cut short"
        raise InputError(f"{path} is {reason}, which is not read; copy it again, or save it again with torch.")
    file.seek(0)
    head = Reader(file, storage)
    value = _loaded(head, path)
    if value != _MAGIC:
        _check_names(path, head.unknown, modules)
        return Content(value, False)
    _, system = (_loaded(Reader(file, storage), path) for _ in range(2))
    if not isinstance(system, Mapping) or system.get("little_endian") is not True:
        raise InputError(f"{path} was written on a machine of the other byte order; save it again on this one.")
    reader = Reader(file, storage)
    value = _loaded(reader, path)
    keys = _loaded(Reader(file, storage), path)
    end, size = file.tell(), os.fstat(file.fileno()).st_size
    for key in keys if isinstance(keys, list) else ():
        known = reader.storages.get(str(key))
        if known is None or known.dtype is None:
            raise InputError(_damaged(path, f"nothing is known of the storage '{key}'"))
        file.seek(end)
        length = int.from_bytes(file.read(8), "little") * known.dtype.itemsize
        places[str(key)] = (end + 8, length)
        end += 8 + length
        if end > size:
            raise InputError(_damaged(path, "it ends too early"))
    _check_names(path, reader.unknown, modules)
    return Content(value, False)


def _loaded(reader: Reader, path: Path) -> Any:
    try:
        return reader.load()
    except Exception as error:  # a damaged pickle can fail in any way
        if reader.unknown:
            _check_names(path, reader.unknown, modules=False)
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
