"""Checkpoints as lazy mappings from tensor name to tensor, whatever the files look like."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.files import sha256
from adamerge.hub import fetch, hub_id, remote_headers
from adamerge.reading import check_regular, exists, is_special, read_json
from adamerge.types import InputError, some

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    },
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
}
_ELSEWHERE = ("demo:", "hf-hub:", "open_clip:")  # sources that are no paths
_INDEX = 2**26  # bytes of an index of shards; that of 100,000 tensors has 10 MB
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


class State(Mapping[str, Tensor]):
    """One checkpoint: names to tensors, each read when asked for.

    Attributes:
        source: What the user wrote.
        files: The files behind it; empty for a mapping held in memory.
        has_values: Tensors can be read, not their shapes alone.
    """

    has_values = True

    def __init__(self, source: str, files: tuple[Path, ...], names: Iterable[str]) -> None:
        self.source, self.files, self._all = source, files, dict.fromkeys(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, name: object) -> bool:
        return name in self._all  # a mapping's own would read the tensor

    def meta(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of a tensor, without reading it where the format allows."""
        tensor = self[name]
        return tensor.shape, tensor.dtype

    @property
    def revision(self) -> str | None:
        """The commit of the hub's repository that the files are of; None for others."""
        parts = self.files[0].absolute().parts if self.files and hub_id(self.source) else ()
        places = [place for place, part in enumerate(parts[:-1]) if part == "snapshots"]
        return parts[places[-1] + 1] if places else None

    def sha256(self) -> str:
        """One digest over the files' digests, in the order of their names."""
        digests = [sha256(file) for file in sorted(self.files, key=lambda file: file.name)]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


class _Memory(State):
    def __init__(self, source: str, tensors: Mapping[str, Tensor], files: tuple[Path, ...] = ()) -> None:
        super().__init__(source, files, tensors)
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


class _Safetensors(State):
    """One or several safetensors files, memory-mapped by the library."""

    def __init__(self, source: str, files: tuple[Path, ...]) -> None:
        self._home: dict[str, Any] = {}
        for file in files:
            try:
                check_regular(file)
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file} is not a whole safetensors file ({error}). It may be truncated or of another format: "
                    "compare its size with the original and copy it again."
                ) from error
            for name in handle.keys():
                if name in self._home:
                    raise InputError(f"{source}: tensor '{name}' stands in two files, one of them {file.name}.")
                self._home[name] = handle
        super().__init__(source, files, self._home)

    def __getitem__(self, name: str) -> Tensor:
        handle = self._home[name]
        with self._explained(name):
            return handle.get_tensor(name)

    def meta(self, name: str) -> tuple[torch.Size, torch.dtype]:
        handle = self._home[name]
        with self._explained(name):
            view = handle.get_slice(name)
            shape, kind = torch.Size(view.get_shape()), view.get_dtype()
        return shape, _dtype(self.source, name, kind)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{self.source}: tensor '{name}' cannot be read ({reason}); copy the file again."
            ) from error


class Headers(State):
    """A checkpoint on the hub, known by the headers of its files alone."""

    has_values = False

    def __init__(self, source: str) -> None:
        self._found = remote_headers(source)
        super().__init__(source, (), self._found)

    def __getitem__(self, name: str) -> Tensor:
        raise RuntimeError(f"{self.source} was opened for its headers; '{name}' has not been fetched.")

    def meta(self, name: str) -> tuple[torch.Size, torch.dtype]:
        shape, kind = self._found[name]
        return torch.Size(shape), _dtype(self.source, name, kind)


def _dtype(source: str, name: str, kind: str) -> torch.dtype:
    if kind not in DTYPES:
        raise InputError(f"{source}: tensor '{name}' has the storage type {kind}, which is not read.")
    return DTYPES[kind]


class Selected(State):
    """Some tensors of a checkpoint, under other names.

    Args:
        state: The checkpoint.
        names: New name to name in the checkpoint.
        source: What the user wrote.
        files: The files behind it.
    """

    def __init__(self, state: State, names: Mapping[str, str], source: str, files: tuple[Path, ...]) -> None:
        super().__init__(source, files, names)
        self._state, self._names = state, dict(names)
        self.has_values = state.has_values

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._names[name]]

    def meta(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return self._state.meta(self._names[name])


class Overlaid(State):
    """A checkpoint some of whose tensors are another one's, with rows of its own.

    Args:
        state: The checkpoint.
        other: The other one.
        rows: By name: the tensor's name in the other one, and for each of its rows the one of the checkpoint that
            stands in its place, or -1.
    """

    def __init__(self, state: State, other: State, rows: Mapping[str, tuple[str, Tensor]]) -> None:
        super().__init__(state.source, state.files, state)
        self._state, self._other, self._rows = state, other, dict(rows)
        self.has_values = state.has_values

    def __getitem__(self, name: str) -> Tensor:
        own = self._state[name]
        if name not in self._rows:
            return own
        key, rows = self._rows[name]
        made = self._other[key].to(own.dtype, copy=True)
        made[rows >= 0] = own[rows[rows >= 0]]
        return made

    def meta(self, name: str) -> tuple[torch.Size, torch.dtype]:
        shape, dtype = self._state.meta(name)
        return (self._other.meta(self._rows[name][0])[0] if name in self._rows else shape), dtype


def open_state(source: str | Path | Mapping[str, Tensor]) -> State:
    """Open a checkpoint.

    Args:
        source: A safetensors file; a folder with one, or with the shards and index that transformers writes; a `.pt` /
            `.pth` / `.bin` / `.ckpt` state dict (read with `weights_only`, memory-mapped); `demo:POOL/NAME`; or a
            mapping in memory.

    Raises:
        InputError: Nothing there, damaged, of another format, or a pickle that holds more than tensors.
    """
    if isinstance(source, State):
        return source
    if isinstance(source, Mapping):
        return _Memory("a mapping in memory", source)
    path = locate(str(source))
    if path.is_dir():
        return _Safetensors(str(source), _files_of(path))
    if path.suffix == ".safetensors":
        return _Safetensors(str(source), (path,))
    if path.suffix in PICKLES:
        return _Memory(str(source), _read_pickle(path), (path,))
    raise InputError(f"{path}: unknown kind of checkpoint; expected .safetensors, a folder, or {', '.join(PICKLES)}.")


def open_headers(source: str) -> State:
    """A checkpoint for its names, shapes and dtypes; of the hub's nothing is fetched but headers.

    Raises:
        InputError: As for `open_state`.
    """
    return Headers(source) if not exists(Path(source).expanduser()) and hub_id(source) else open_state(source)


def absolute(source: str) -> str:
    """The source as it can be found again from any working directory."""
    if source.startswith(_ELSEWHERE) or hub_id(source) is not None:
        return source
    path = source.removeprefix("local-dir:")
    return source[: len(source) - len(path)] + str(Path(path).expanduser().resolve())


def locate(source: str, *, weights: bool = True, code: bool = False) -> Path:
    """The path of a source; a `demo:` source is built on first use, what the hub has is fetched.

    Args:
        source: A path, `demo:POOL/NAME`, or a hub id such as `ORG/NAME@REVISION`.
        weights: Fetch the weights too, not the small files alone.
        code: Fetch its files in Python too.

    Raises:
        InputError: No such file or folder.
    """
    if source.startswith("demo:"):
        from adamerge.demo import locate_demo

        return locate_demo(source.removeprefix("demo:"))
    path = Path(source.removeprefix("local-dir:")).expanduser()
    there = exists(path)
    if not there and hub_id(source) is not None:
        return fetch(source, weights=weights, code=code)
    if not there:
        raise InputError(f"There is no checkpoint at '{source}' (looked in {path.parent.absolute()}).")
    # whatever library opens one of these: a pipe would block it
    special = [each for each in (path.iterdir() if path.is_dir() else (path,)) if is_special(each)]
    check_regular(*special)
    return path


def _files_of(folder: Path) -> tuple[Path, ...]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        usual = folder / "model.safetensors"  # the name that transformers gives
        if usual in files:
            return (usual,)
        pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES and file.is_file()]
        if not files and pickles:
            raise InputError(
                f"{folder} holds no safetensors files, but pickles: {some(pickles)}. Convert them once, with "
                f"`adamerge convert {folder} {folder}-safetensors`, and name the new folder."
            )
        if len(files) != 1:
            raise InputError(
                f"{folder} holds {len(files)} safetensors files and no index of shards; name the one that you mean."
            )
        return (files[0],)
    if len(indices) > 1:
        raise InputError(
            f"{folder} holds {len(indices)} indices of shards: {', '.join(i.name for i in indices)}; keep one."
        )
    return shards_of(indices[0])


def shards_of(index: Path) -> tuple[Path, ...]:
    """Return the files that an index of shards names, all of them in its folder.

    Raises:
        InputError: No index, or one that names what is missing, outside its folder, or no file.
    """
    read = read_json(index, limit=_INDEX)
    weight_map = read.get("weight_map") if isinstance(read, dict) else None
    names = set(weight_map.values()) if isinstance(weight_map, dict) and _are_texts(weight_map.values()) else set()
    if not names:
        raise InputError(f"{index} is no index of shards: it needs a 'weight_map' of tensor name to file.")
    for name in sorted(names):
        if Path(name).name != name or name in ("", ".."):
            raise InputError(f"{index} points outside its folder ('{name}'); such a checkpoint is not read.")
        if not exists(index.parent / name):
            raise InputError(f"{index} names the shard '{name}', which is missing; copy the whole folder.")
        check_regular(index.parent / name)
    return tuple(index.parent / name for name in sorted(names))


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _read_pickle(path: Path) -> Mapping[str, Tensor]:
    try:
        check_regular(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # files of torch < 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(
            f"{path} is not a plain state dict: it is damaged, or its pickle holds other objects than tensors, "
            "which could run code and is never read. Take the tensors out of it: "
            f"`adamerge convert {path} NEW.safetensors`."
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()
    ):
        raise InputError(
            f"{path} holds other things than named tensors; take these out of it: "
            f"`adamerge convert {path} NEW.safetensors`."
        )
    return state
