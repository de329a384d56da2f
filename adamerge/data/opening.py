"""Where Hugging Face `datasets` finds the splits of a data set."""

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from adamerge.checkpoints import locate
from adamerge.data.base import MissingSplit
from adamerge.hub import hub_or_cache
from adamerge.reading import exists, read_json
from adamerge.types import InputError

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_BLANKS = {"keep_default_na": False, "na_values": [""]}  # what is missing in csv; "NA" or "null" are texts


class Source:
    """A data set by path or hub id; each of its splits is opened once.

    Args:
        path: Hub id, folder, file, or a file for each split.
        name: Configuration of a hub data set.
        revision: Revision of a hub data set.
        splits: The expression for a split that is not called by its name.
        stream: Take so many samples off the beginning of each split.
    """

    def __init__(
        self,
        path: str | Mapping[str, str],
        name: str | None,
        revision: str | None,
        splits: Mapping[str, str],
        stream: int | None,
    ) -> None:
        self._path, self._name, self._revision, self._splits, self._stream = path, name, revision, splits, stream
        self._opened: dict[str, Any] = {}
        if isinstance(path, Mapping) and not path:
            raise InputError("`path` is empty; name a file for each split.")

    def __str__(self) -> str:
        return self._path if isinstance(self._path, str) else " and ".join(self._path.values())

    @property
    def first(self) -> str:
        """An expression for the split whose class names count: the first of those that are named, else `train`."""
        if self._splits:
            return next(iter(self._splits.values()))
        if isinstance(self._path, Mapping):
            there = list(self._path)
        else:
            there = self._saved() or ["train"]
        return "train" if "train" in there else str(there[0])

    def split(self, name: str) -> Any:
        """A split by the name that the run calls it.

        Raises:
            MissingSplit: No such split.
            InputError: It cannot be read.
        """
        return self.open(self.expression(name))

    def expression(self, name: str) -> str:
        """Return the expression for a split, given the name that the run calls it."""
        whole = isinstance(self._path, str) and self._folder.is_file() and name not in self._splits
        return "train" if whole else self._splits.get(name, name)

    def open(self, expression: str) -> Any:
        """The samples that an expression as `train[80%:]` stands for, as a `datasets.Dataset`."""
        return self._kept(expression, self._load)

    def peek(self, expression: str) -> Any:
        """Return at least the first sample that an expression stands for, as a `datasets.Dataset`.

        For data on the hub it is empty, with columns and types alone; None where the hub describes not even these.
        """
        return self._opened.get(expression) or self._kept(f"{expression} peeked", lambda _: self._peek(expression))

    def _kept(self, key: str, load: Callable[[str], Any]) -> Any:
        if key not in self._opened:
            expression = key.removesuffix(" peeked")
            try:
                self._opened[key] = load(expression)
            except InputError:
                raise
            except Exception as error:  # `datasets` and the hub raise what they like
                reason = " ".join(str(error).split())[:300].removesuffix(".") or "it is empty"
                kind = MissingSplit if re.match(r"(Unknown|Bad) split", reason) else InputError
                raise kind(
                    f"The split '{expression}' of the data set '{self}' cannot be opened: {reason}. Check the path or "
                    f"hub id, the split's name, and the network.{self._not_here() if kind is InputError else ''}"
                ) from error
        return self._opened[key]

    @property
    def named(self) -> list[str]:
        """An expression for every split that is known without opening one."""
        there = list(self._path) if isinstance(self._path, Mapping) else self._saved()
        return list(dict.fromkeys([self.first, *self._splits.values(), *there]))

    def _saved(self) -> list[str]:
        """The splits in a folder of `save_to_disk`; none of other data."""
        index = self._folder / "dataset_dict.json"
        told = read_json(index) if exists(index) else {}
        return list(told.get("splits") or []) if isinstance(told, dict) else []

    def _not_here(self) -> str:
        """The end of a message that a data set was not found: that the path names nothing on this machine either."""
        if isinstance(self._path, Mapping) or self._path.startswith("demo:") or self._folder.exists():
            return ""
        return f" There is no folder or file '{self._path}' here either."

    @cached_property
    def _folder(self) -> Path:
        assert isinstance(self._path, str)
        return locate(self._path) if self._path.startswith("demo:") else Path(self._path).expanduser()

    def _peek(self, expression: str) -> Any:
        import datasets

        name = expression.partition("[")[0]
        if isinstance(self._path, Mapping) or self._folder.exists() or _suffix(Path(self._path)) in _READERS:
            saved = isinstance(self._path, str) and self._saved()  # whole at the price of a few
            found = self.open(name) if saved else self._load(name, stream=1)
            if len(found) == 0:
                raise InputError(f"The split '{name}' of the data set '{self}' has no samples.")
            return found
        with hub_or_cache():
            info = datasets.load_dataset_builder(self._path, name=self._name, revision=self._revision).info
        if info.splits and name not in info.splits:
            raise MissingSplit(f"The data set '{self}' has no split '{name}'; it has {', '.join(info.splits)}.")
        if info.features is None:
            return None
        return datasets.Dataset.from_dict({column: [] for column in info.features}, features=info.features)

    def _load(self, expression: str, stream: int | None = None) -> Any:
        import datasets

        stream = stream or self._stream
        name, _, part = expression.partition("[")
        if isinstance(self._path, Mapping):
            if name not in self._path:
                raise MissingSplit(f"There is no split '{name}'; `path` has a file for {', '.join(self._path)}.")
            return self._read(_file_options(Path(self._path[name]), name), expression, stream)
        folder = self._folder
        if (folder / "dataset_dict.json").exists():
            there = self._saved()
            if name not in there:
                raise MissingSplit(f"The data set in {folder} has no split '{name}'; it has {', '.join(there)}.")
            whole = datasets.load_from_disk(str(folder / name))
            start, stop = 0, len(whole)
            if part:
                (piece,) = datasets.ReadInstruction.from_spec(expression).to_absolute({name: len(whole)})
                start, stop = piece.from_ or 0, stop if piece.to is None else piece.to
            stop = stop if stream is None else min(stop, start + stream)
            return whole if (start, stop) == (0, len(whole)) else whole.select(range(start, stop))
        if (folder / "state.json").exists():
            raise InputError(f"{folder} is one split of a data set; name the folder above it.")
        if folder.is_file():
            return self._read(_file_options(folder, "train"), expression, stream)
        if not folder.exists() and _suffix(folder) in _READERS:
            raise InputError(f"There is no file {folder}.")
        if not folder.exists():
            return self._read({"path": self._path}, expression, stream)
        builder = datasets.load_dataset_builder(str(folder), name=self._name)
        blanks = _BLANKS if hasattr(builder.config, "keep_default_na") else {}  # of csv alone
        return self._read({"path": str(folder), **blanks}, expression, stream)

    def _read(self, options: Mapping[str, Any], expression: str, stream: int | None) -> Any:
        import datasets

        options = {**options, "name": self._name, "revision": self._revision, "split": expression}
        with hub_or_cache():
            if stream is None:
                return datasets.load_dataset(**options)
            if "[" in expression:
                raise InputError(f"A stream cannot be cut as `splits` says, '{expression}'; name a whole split.")
            return _taken(datasets.load_dataset(**options, streaming=True), stream)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


def _suffix(file: Path) -> str:
    return Path(file.stem if file.suffix.lower() == ".gz" else file.name).suffix.lower()


def _file_options(file: Path, split: str) -> dict[str, Any]:
    """Return the arguments with which `load_dataset` reads one file."""
    suffix = _suffix(file)
    if not file.is_file():
        raise InputError(f"There is no file {file}.")
    if suffix not in _READERS:
        raise InputError(f"The file {file} is of no known kind; it can be {', '.join(_READERS)}, or a gz of one.")
    if file.stat().st_size == 0:
        raise InputError(f"The file {file} is empty; write samples into it, or name another.")
    options = _BLANKS if _READERS[suffix] == "csv" else {}
    delimiter = {"delimiter": "\t"} if suffix == ".tsv" else {}
    return {"path": _READERS[suffix], "data_files": {split: str(file)}, **options, **delimiter}


def _taken(stream: Any, number: int) -> Any:
    """The first samples of a stream, held in memory with images as they are encoded."""
    import datasets

    features = stream.features
    for column, feature in (features or {}).items():
        if getattr(feature, "decode", False):
            stream = stream.cast_column(column, type(feature)(decode=False))
    return datasets.Dataset.from_list(list(islice(stream, number)), features=features)


def names_of(feature: Any) -> list[str]:
    """The class names of a column of labels, or of lists of labels; none where it has none."""
    inner = getattr(feature, "feature", feature)
    return list(getattr(inner, "names", None) or ())
