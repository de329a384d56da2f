"""Images in folders, decoded when asked for."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from adamerge.checkpoints import absolute
from adamerge.data.base import MissingSplit, TaskData
from adamerge.data.class_names import class_names
from adamerge.data.pictures import SUFFIXES, decoded, is_picture
from adamerge.types import UNLABELED, InputError, some


class ImageFolder(TaskData):
    """Images in folders: ROOT/SPLIT/CLASS/NAME.png, or unlabeled ones right in ROOT/SPLIT.

    Hidden files and files that are not named as images do not count. The classes are the folders of the split `train`;
    where it has none, of the first split that has some.

    Args:
        root: The folder.
        classes: What the classes are called in prompts: by the name of their folder; or as many names as there are
            folders, in alphabetical order of these, or a text file of them, one on each line. Default: the folders'
            names with spaces for underscores.
        splits: The folder of a split, where it has another name.

    Raises:
        InputError: No such folder, class names that do not fit the folders, a split with other class folders, or files
            that are no readable images.
    """

    repeatable = True

    def __init__(
        self,
        root: str,
        *,
        classes: Sequence[str] | Mapping[str, str] | str | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments["root"] = absolute(root)  # found again from any working directory
        self._root = Path(absolute(root))
        self._given = self._arguments["classes"] = class_names(classes) if isinstance(classes, str) else classes
        self._splits = dict(splits or {})

    @property
    def classes(self) -> Sequence[str]:
        _, folders = self._numbered()
        if self._given is None:
            return [name.replace("_", " ") for name in folders]
        given = list(self._given)
        if not folders and not isinstance(self._given, Mapping):
            return given  # of unlabeled images
        if len(given) != len(folders) or (isinstance(self._given, Mapping) and set(given) != set(folders)):
            raise InputError(f"`classes` has {some(given)}; the class folders in {self._root} are {some(folders)}.")
        return [self._given[name] for name in folders] if isinstance(self._given, Mapping) else given

    def _numbered(self) -> tuple[str, list[str]]:
        """The split whose class folders number the labels, and these; none where no split has any."""
        there = self._folders(self._root)
        if not there:
            raise InputError(f"{self._root} holds no folders of splits: SPLIT/CLASS with images, or SPLIT.")
        first = self._splits.get("train", "train")
        for name in dict.fromkeys([first, *self._splits.values(), *there]):
            if name in there and (found := self._folders(self._root / name)):
                return name, found
        return first, []

    def _folders(self, where: Path) -> list[str]:
        if not where.is_dir():
            raise InputError(f"There is no image folder at {where}.")
        return sorted(each.name for each in where.iterdir() if each.is_dir() and not each.name.startswith("."))

    def peek(self, split: str) -> Sequence[str]:
        folder, kinds = self._checked(split)
        places = [folder.glob("*"), *((folder / kind).rglob("*") for kind in kinds)]
        if not any(_images([file]) for place in places for file in place):
            raise InputError(f"{folder} holds no images for the split '{split}'.")
        return self.classes

    def split(self, name: str) -> Dataset[Mapping[str, Any]]:
        folder, kinds = self._checked(name)
        samples = [
            (file, label) for label, kind in enumerate(kinds) for file in _images(sorted((folder / kind).rglob("*")))
        ]
        samples += [(file, UNLABELED) for file in _images(sorted(folder.glob("*")))]
        unreadable = [str(file) for file, _ in samples if not is_picture(file)]
        if unreadable:
            raise InputError(f"Files that are no readable images: {some(unreadable)}. Remove or replace them.")
        return _Files(samples)

    def _checked(self, name: str) -> tuple[Path, list[str]]:
        """A split's folder, and the class folders that number its labels."""
        folder, there = self._root / self._splits.get(name, name), self._folders(self._root)
        if not folder.is_dir():
            raise MissingSplit(f"{self._root} has no folder '{folder.name}' for the split '{name}'; it has {there}.")
        first, kinds = self._numbered()
        strange = sorted(set(self._folders(folder)) - set(kinds))
        if strange:
            raise InputError(
                f"The split '{name}' in {folder} has class folders that '{first}' lacks: {some(strange)}. Labels are "
                f"numbered by the folders of '{first}': add these there, empty if need be, or move them away."
            )
        return folder, kinds


def _images(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


class _Files(Dataset[Mapping[str, Any]]):
    def __init__(self, samples: Sequence[tuple[Path, int]]) -> None:
        self._samples = samples

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the files' names, sizes and times, and of their labels."""
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns, label) for file, label in self._samples]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    @property
    def labelled(self) -> bool:
        """True where some image stands in a class folder."""
        return any(label != UNLABELED for _, label in self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        file, label = self._samples[index]
        return {"image": decoded(file), "label": label}
