"""Images from folders and from Hugging Face `datasets`, decoded when asked for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from adamerge.checkpoints import absolute, locate
from adamerge.data.base import TaskData
from adamerge.hub import hub_or_cache
from adamerge.types import UNLABELED, InputError, some

_SUFFIXES = frozenset(Image.registered_extensions())


class ImageFolder(TaskData):
    """Images in folders: ROOT/SPLIT/CLASS/NAME.png, or unlabeled ones right in ROOT/SPLIT.

    Hidden files and files that are not named as images do not count. The classes are those of all splits together.

    Args:
        root: The folder.
        classes: What the classes are called in prompts: by the name of their folder, or as many names as there are
            folders, in alphabetical order of these. Default: the folders' names with spaces for underscores.
        splits: The folder of a split, where it has another name.

    Raises:
        InputError: No such folder, class names that do not fit the folders, or files that are no readable images.
    """

    repeatable = True

    def __init__(
        self,
        root: str,
        *,
        classes: Sequence[str] | Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments["root"] = absolute(root)  # found again from any working directory
        self._root = Path(absolute(root))
        self._given, self._splits = classes, dict(splits or {})

    @property
    def classes(self) -> Sequence[str]:
        folders = self._folders()
        if self._given is None:
            return [name.replace("_", " ") for name in folders]
        given = list(self._given)
        if len(given) != len(folders) or (isinstance(self._given, Mapping) and set(given) != set(folders)):
            raise InputError(f"`classes` has {some(given)}; the class folders in {self._root} are {some(folders)}.")
        return [self._given[name] for name in folders] if isinstance(self._given, Mapping) else given

    def _folders(self) -> list[str]:
        """The names of the class folders, of all splits together."""
        if not self._root.is_dir():
            raise InputError(f"There is no image folder at {self._root}.")
        splits = [folder for folder in self._root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
        found = {c.name for s in splits for c in s.iterdir() if c.is_dir() and not c.name.startswith(".")}
        if not found:
            raise InputError(f"{self._root} holds no SPLIT/CLASS folders with images.")
        return sorted(found)

    def split(self, name: str) -> Dataset[Mapping[str, Any]]:
        folder = self._root / self._splits.get(name, name)
        if not folder.is_dir():
            there = sorted(each.name for each in self._root.iterdir() if each.is_dir())
            raise InputError(f"{self._root} has no folder '{folder.name}' for the split '{name}'; it has {there}.")
        samples = [
            (file, label)
            for label, kind in enumerate(self._folders())
            for file in _images(sorted((folder / kind).rglob("*")))
        ]
        samples += [(file, UNLABELED) for file in _images(sorted(folder.glob("*")))]
        unreadable = [str(file) for file, _ in samples if not _has_header(file)]
        if unreadable:
            raise InputError(f"Files that are no readable images: {some(unreadable)}. Remove or replace them.")
        return _Files(samples)


def _images(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")]


class _Files(Dataset[Mapping[str, Any]]):
    def __init__(self, samples: Sequence[tuple[Path, int]]) -> None:
        self._samples = samples

    @property
    def fingerprint(self) -> str:
        """Of the files' names, sizes and times, and of their labels."""
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns, label) for file, label in self._samples]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        file, label = self._samples[index]
        try:
            with Image.open(file) as image:
                image.load()
                return {"image": ImageOps.exif_transpose(image), "label": label}
        except (OSError, Image.DecompressionBombError) as error:
            raise InputError(f"The image {file} cannot be decoded ({error}); remove or replace it.") from error


def _has_header(file: Path) -> bool:
    try:
        with Image.open(file):
            return True
    except Image.DecompressionBombError:
        return True  # said when it is decoded
    except (UnidentifiedImageError, OSError):
        return False


class HFDataset(TaskData):
    """A data set of Hugging Face `datasets`: a hub id, a folder of `save_to_disk`, or one of parquet, jsonl or images.

    Args:
        path: Hub id, folder, or `demo:zoo/data/TASK`.
        name: Configuration of a hub data set.
        revision: Revision of a hub data set: a commit, tag or branch.
        splits: The data set's own expression for a split: `{unlabeled: "train[80%:]"}`; by default its name.
        columns: The data set's column for an entry of a sample.
        classes: What the classes are called in prompts, in the order of the labels. Default: the names in the data set.

    Raises:
        InputError: Nothing there, no network, no such split or column, or class names that do not fit the labels.
    """

    repeatable = True

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        revision: str | None = None,
        splits: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if Path(path).expanduser().exists():  # found again from any working directory
            path = self._arguments["path"] = absolute(path)
        self._path, self._name, self._revision = path, name, revision
        self._splits, self._given = dict(splits or {}), classes
        self._columns = {"image": "image", "label": "label"} | dict(columns or {})
        self._opened: dict[str, Any] = {}

    @property
    def classes(self) -> Sequence[str]:
        feature = self._open(self._first_split()).features.get(self._columns["label"])
        names = getattr(feature, "names", None)
        if self._given is None:
            if names is None:
                raise InputError(f"{self._path} does not name its classes; list them in `classes`.")
            return list(names)
        if names is not None and len(names) != len(self._given):
            raise InputError(f"`classes` has {some(self._given)}; the labels of {self._path} are {some(names)}.")
        return list(self._given)

    def split(self, name: str) -> Dataset[Mapping[str, Any]]:
        opened = self._open(self._splits.get(name, name))
        columns = {entry: column for entry, column in self._columns.items() if column in opened.column_names}
        missing = [column for entry, column in self._columns.items() if entry not in columns and entry != "label"]
        if missing:
            there = ", ".join(opened.column_names)
            raise InputError(f"{self._path} has no column {', '.join(missing)}; it has {there}. "
                             "Say in `columns` what an entry is called there.")  # fmt: skip
        self._check_order(name, opened)
        return _Rows(opened.select_columns(list(columns.values())), columns, self._path)

    def _check_order(self, split: str, opened: Any) -> None:
        """Labels mean the same in every split."""
        feature = opened.features.get(self._columns["label"])
        names, first = getattr(feature, "names", None), self._open(self._first_split()).features
        expected = getattr(first.get(self._columns["label"]), "names", None)
        if names is not None and expected is not None and names != expected:
            raise InputError(
                f"The split '{split}' of {self._path} numbers its classes otherwise than the first one: {some(names)}, "
                f"not {some(expected)}."
            )

    def _first_split(self) -> str:
        """Where the class names are read: the first split there is."""
        index = self._folder() / "dataset_dict.json"
        there = json.loads(index.read_text())["splits"] if index.exists() else ["train"]
        return next(iter(self._splits.values()), "train" if "train" in there else there[0])

    def _folder(self) -> Path:
        return locate(self._path) if self._path.startswith("demo:") else Path(self._path).expanduser()

    def _open(self, split: str) -> Any:
        if split not in self._opened:
            self._opened[split] = self._load(split)
        return self._opened[split]

    def _load(self, split: str) -> Any:
        import datasets

        folder = self._folder()
        try:
            if (folder / "dataset_dict.json").exists():
                name, _, part = split.partition("[")
                whole = datasets.load_from_disk(str(folder / name))
                if not part:
                    return whole
                (piece,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(whole)})
                return whole.select(range(piece.from_ or 0, len(whole) if piece.to is None else piece.to))
            if (folder / "state.json").exists():
                raise InputError(f"{folder} is one split of a data set; name the folder above it.")
            where = str(folder) if folder.exists() else self._path
            with hub_or_cache():
                return datasets.load_dataset(where, self._name, revision=self._revision, split=split)
        except InputError:
            raise
        except Exception as error:  # `datasets` and the hub raise what they like
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"The split '{split}' of the data set '{self._path}' cannot be opened: {reason}. "
                             "Check the path or hub id, the split's name, and the network.") from error  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


class _Rows(Dataset[Mapping[str, Any]]):
    def __init__(self, rows: Any, columns: Mapping[str, str], path: str) -> None:
        self._rows, self._columns, self._path = rows, columns, path

    @property
    def fingerprint(self) -> str:
        """That of `datasets`, which changes with whatever was done to the rows."""
        return str(self._rows._fingerprint)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            return self._sample(index, self._rows[index])
        except (OSError, Image.DecompressionBombError) as error:
            raise InputError(f"Sample {index} of {self._path} cannot be decoded ({error}); leave it out.") from error

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Several samples, which `datasets` reads faster together; torch's loader asks so."""
        try:
            columns = self._rows[indices]
        except (OSError, Image.DecompressionBombError):  # one of them; which one is said
            return [self[index] for index in indices]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [self._sample(index, row) for index, row in zip(indices, rows, strict=True)]

    def _sample(self, index: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
        label = row[self._columns["label"]] if "label" in self._columns else None
        if label is not None and not isinstance(label, int):
            raise InputError(
                f"Sample {index} of {self._path} is labelled {label!r}; labels are whole numbers: cast the column to "
                "ClassLabel."
            )
        kept = {entry: row[column] for entry, column in self._columns.items()}
        return {**kept, "label": UNLABELED if label is None or label < 0 else label}
