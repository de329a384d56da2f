"""From a pickled checkpoint to safetensors: the same tensors, bit by bit, checked after writing."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adamerge.checkpoints import DTYPES, PICKLES, locate, shards_of
from adamerge.convert.archives import opened
from adamerge.convert.parts import Array, Stored
from adamerge.convert.states import Tensors, named_tensors
from adamerge.files import atomic_dir, atomic_file
from adamerge.types import InputError, some

_SHARD = 5_000_000_000  # bytes
_LARGEST, _SPARE = 32, 2**26  # tensors may take 32 times the bytes of their files, as tied ones do, and 64 MB
_INDEX = ".bin.index.json"
_OURS = {"pytorch_model": "model", "open_clip_pytorch_model": "open_clip_model"}  # what their libraries look for
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        out: The file or folder.
        tensors: How many tensors it holds.
        bytes: Their size.
        dtypes: How many are of each type, by safetensors' name of it.
        tied: Names whose tensor stands under an earlier name as well; each holds a copy.
        left_out: What stood in the source and is not in `out`.
    """

    out: Path
    tensors: int
    bytes: int
    dtypes: Mapping[str, int]
    tied: Sequence[str] = ()
    left_out: Sequence[str] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{name}: {count}" for name, count in self.dtypes.items())
        tied = f"{len(self.tied)} of them stand under several names, and are written under each.\n" if self.tied else ""
        left = f"Left out: {', '.join(self.left_out)}.\n" if self.left_out else ""
        return (
            f"Converted {self.tensors} tensors ({kinds}; {self.bytes / 1e6:,.1f} MB), read back and equal bit by bit.\n"
            f"{tied}{left}{'Folder' if self.out.is_dir() else 'File'}: {self.out}"
        )


def convert(source: str | Path, out: str | Path, *, modules: bool = False, key: str | None = None) -> Converted:
    """Write a pickled checkpoint as safetensors, without running anything of what the pickle names.

    Args:
        source: A checkpoint that torch pickled (a state dict, one beside an optimizer's state, a TorchScript archive),
            or a folder with one, or with its shards and their index.
        out: The safetensors file; for a folder, the folder, which gets the other files as well. It must not exist.
        modules: Also read pickles of whole modules and of other objects, whose classes are neither imported nor made:
            inert stand-ins take their places, and the tensors are taken out of these.
        key: The entry that holds the tensors, where there are several such.

    Raises:
        InputError: `out` exists; no or a damaged checkpoint; a pickle that names other things than plain data and
            tensors; nothing or several things in it that could be the state dict; no space left on the disk.
    """
    path, target = locate(str(source)), _resolved(out)
    files, other = _pickles_of(path) if path.is_dir() else ((path,), [])
    _check_target(path, target)
    with ExitStack() as stack:
        tensors: Tensors = {}
        left_out: list[str] = []
        for file in files:
            content = stack.enter_context(opened(file, modules=modules))
            with _explained(str(file)):
                found, beside = named_tensors(content.value, str(file), key)
            twice = [name for name in found if name in tensors]
            if twice:
                raise InputError(f"{path} holds {some(twice)} in two shards, one of them {file.name}; keep one.")
            tensors |= found
            left_out += [*beside, *(["the code of the TorchScript archive"] if content.script else [])]
        _check_names(tensors, str(path))
        _check_types(tensors, str(path))
        _check_sizes(tensors, str(path), sum(file.stat().st_size for file in files))
        if path.is_dir():
            skipped = [name for name in other if _is_pickle(name)]
            left_out += [str(name.relative_to(path)) for name in skipped]
            _write_folder(tensors, path, target, files[0], [name for name in other if name not in skipped])
        else:
            with atomic_file(target) as new:
                _write(tensors, new, str(path))
                _refuse_existing(target)
    sizes = Counter(_NAMES[tensor.dtype] for tensor in tensors.values())
    total = sum(tensor.nbytes for tensor in tensors.values())
    return Converted(target, len(tensors), total, dict(sizes), tuple(_tied(tensors)), tuple(dict.fromkeys(left_out)))


def _resolved(out: str | Path) -> Path:
    try:
        return Path(out).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a null character, a circle of links, no such user's home
        raise InputError(f"{str(out)!r} is no name of a file or folder ({error}); choose another one.") from error


def _pickles_of(folder: Path) -> tuple[tuple[Path, ...], list[Path]]:
    """The files with the weights, and all others but hidden ones and indices of shards."""
    there = sorted(file for file in folder.rglob("*") if file.is_file())
    there = [file for file in there if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    safe = [file.name for file in there if file.parent == folder and file.suffix == ".safetensors"]
    if safe:
        raise InputError(f"{folder} holds {some(safe)} already: use it as it is, or name the pickled file itself.")
    top = [file for file in there if file.parent == folder and _is_pickle(file)]
    named = [file for file in top if file.stem in _OURS]
    files = named or [file for file in top if not file.stem.startswith(_NO_WEIGHTS)]
    indices = [file for file in there if file.parent == folder and file.name.endswith(_INDEX)]
    if len(indices) == 1:
        files = list(shards_of(indices[0]))
    elif len(files) != 1:
        raise InputError(
            f"{folder} holds {len(files)} pickled checkpoints and {len(indices)} indices of shards"
            f"{f': {some(file.name for file in files)}' if files else ''}; name the file itself."
        )
    return tuple(files), [file for file in there if file not in files and file not in indices]


def _is_pickle(file: Path) -> bool:
    return file.suffix in (*PICKLES, ".pkl", ".pickle", ".tar")


def _check_target(source: Path, target: Path) -> None:
    if source.suffix == ".safetensors":
        raise InputError(f"{source} is a safetensors file already; use it as it is.")
    if source.is_dir() == (target.suffix == ".safetensors"):
        kind = (
            "a folder: give a folder to write" if source.is_dir() else "a file: give a name that ends in .safetensors"
        )
        raise InputError(f"{source} is {kind}, not {target}.")
    _refuse_existing(target)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise InputError(f"{target} exists already and is not overwritten: choose another name, or remove it.")


def _check_names(tensors: Tensors, source: str) -> None:
    if not tensors:
        raise InputError(f"{source} holds no named tensors; save `model.state_dict()`.")
    strange = [name for name in tensors if name == "__metadata__" or not _is_text(name)]
    if strange:
        raise InputError(f"{source} holds tensors whose names are not written: {some(strange)}; rename them.")


def _is_text(name: str) -> bool:
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _check_types(tensors: Tensors, source: str) -> None:
    with _explained(source):
        strange = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype not in _NAMES}
    if strange:
        kinds = ", ".join(map(str, dict.fromkeys(strange.values())))
        raise InputError(f"{source} holds tensors of types that are not written ({kinds}): {some(strange)}; cast them.")


def _check_sizes(tensors: Tensors, source: str, size: int) -> None:
    """Check, before any is read, that every tensor lies in its storage and all together are not too large."""
    with _explained(source):
        for tensor in tensors.values():
            tensor.check()
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _LARGEST * size + _SPARE:
        total = min(total, 10**24)
        raise InputError(
            f"{source} has {size / 1e6:,.1f} MB, but its tensors would take {total / 1e6:,.1f} MB: they are expanded "
            f"views of few values, or the same ones under many names. More than {_LARGEST} times the size is not "
            "written; save each of them once, and expand them in the model."
        )


def _write_folder(tensors: Tensors, source: Path, target: Path, first: Path, other: Sequence[Path]) -> None:
    """Shards of at most 5 GB with their index, or one file; beside them copies of the other files."""
    shards = list(_shards(tensors))
    stem = first.stem.partition("-0")[0]
    stem = _OURS.get(stem, stem)
    index: dict[str, str] = {}
    with atomic_dir(target) as new:
        for number, shard in enumerate(shards, 1):
            name = f"{stem}{f'-{number:05d}-of-{len(shards):05d}' if len(shards) > 1 else ''}.safetensors"
            _write(shard, new / name, str(source))
            index |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            told = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": index}
            (new / f"{stem}.safetensors.index.json").write_text(json.dumps(told, indent=2))
        for file in other:
            (new / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, new / file.relative_to(source))
        _refuse_existing(target)


def _shards(tensors: Tensors) -> Iterator[Tensors]:
    shard: Tensors = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > _SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write(tensors: Tensors, file: Path, source: str) -> None:
    """One file; what is read back is compared with what was in memory.

    Raises:
        InputError: A tensor whose bytes are not all there, or a file that does not hold what was written.
    """
    with _explained(source):
        by_place = sorted(tensors, key=lambda name: _storage(tensors[name]))  # each storage is read once
        read = {name: tensors[name].read() for name in by_place}
    save_file(read, file, metadata={"format": "pt"})
    with safe_open(file, framework="pt") as written:
        wrong = [name for name, tensor in read.items() if not _same(tensor, written.get_tensor(name))]
    if wrong:
        raise InputError(f"{source}: {some(wrong)} came back otherwise from the disk than written; check the disk.")


@contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{source} is damaged: its tensors cannot be read ({reason}); copy it again.") from error


def _same(one: Tensor, other: Tensor) -> bool:
    flat = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*flat)


def _storage(tensor: Stored | Array) -> tuple[int, str]:
    return (id(tensor.storage.bytes), tensor.storage.key) if isinstance(tensor, Stored) else (0, "")


def _tied(tensors: Tensors) -> Iterator[str]:
    """Names of tensors that lie in the same place as an earlier one."""
    seen: set[Any] = set()
    for name, tensor in tensors.items():
        place = (id(tensor.storage), tensor.offset, tensor.shape) if isinstance(tensor, Stored) else id(tensor)
        if place in seen:
            yield name
        seen.add(place)
