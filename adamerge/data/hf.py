"""Images and texts of Hugging Face `datasets`: from the hub, from folders, from single files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from adamerge.checkpoints import absolute
from adamerge.data.base import TaskData
from adamerge.data.class_names import class_names
from adamerge.data.opening import Source, names_of
from adamerge.data.rows import Rows, is_blank
from adamerge.types import InputError, some


class HFDataset(TaskData):
    """A data set of images or texts that Hugging Face `datasets` reads.

    A sample's entries are `image`, or `text` and perhaps `pair`, `positive` (a text that means the same) or `target` (a
    text to write), or `words`; and `label`, a number or name, of `words` one for each of them. Splits may lack labels.

    Args:
        path: Hub id; folder of `save_to_disk`; folder of parquet, jsonl, csv or images; one file (jsonl, json, csv, tsv
            or parquet, the first four also as gz), which is every split that `splits` does not name; a file for each
            split; or `demo:zoo/data/TASK`.
        name: Configuration of a hub data set.
        revision: Revision of a hub data set: a commit, tag or branch.
        splits: The data set's own expression for a split: `{unlabeled: "train[80%:]"}`; by default its name.
        columns: The data set's column for an entry of a sample; by default the one of that name. Of data with images,
            no further entries but labels are taken unless they stand here.
        classes: The names of the classes, in the order of the labels: what they are called in prompts, and what labels
            in words are numbered by; or a text file with one on each line, of your own or as
            `configs/classes/sun397.txt`. Default: the names in the data set, if it has any.
        stream: Take so many samples off the beginning of each split, instead of downloading the data set.

    Raises:
        InputError: Nothing there, no network, no such split or column, or class names that do not fit the labels.
    """

    repeatable = True
    entries: ClassVar[tuple[str, ...]] = ("image", "text", "words", "pair", "positive", "target", "label")

    def __init__(
        self,
        path: str | Mapping[str, str],
        *,
        name: str | None = None,
        revision: str | None = None,
        splits: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
        classes: Sequence[str] | str | None = None,
        stream: int | None = None,
    ) -> None:
        self._arguments["path"] = path = _absolute(path)  # found again from any working directory
        strange = [entry for entry in columns or {} if entry not in self.entries]
        if strange:
            raise InputError(f"`columns` names {some(strange)}; a sample's entries are {', '.join(self.entries)}.")
        if stream is not None and stream < 1:
            raise InputError(f"`stream` is {stream}; it is a number of samples, at least 1.")
        self._source = Source(path, name, revision, splits or {}, stream)
        self._columns, self._given = dict(columns or {}), None if classes is None else class_names(classes)
        self._arguments["classes"] = self._given

    @property
    def classes(self) -> Sequence[str]:
        return self._classes(self._source.open(self._source.first))

    def peek(self, split: str) -> Sequence[str]:
        found = self._source.peek(self._source.expression(split))
        if found is not None:
            columns = self._columns_of(found)
            if len(found):
                self._rows(found, columns)[0]
        return self._classes(self._source.peek(self._source.first))

    def _classes(self, opened: Any) -> Sequence[str]:
        names = [] if opened is None else self._names(opened)
        if self._given is None:
            return names
        if names and len(names) != len(self._given):
            raise InputError(f"`classes` has {some(self._given)}; the labels of {self._source} are {some(names)}.")
        return list(self._given)

    def split(self, name: str) -> Dataset[Mapping[str, Any]]:
        opened = self._source.split(name)
        columns = self._columns_of(opened)
        self._check_order(name, opened)
        rows = self._rows(opened, columns)
        rows.check()
        return rows

    def _rows(self, opened: Any, columns: Mapping[str, str]) -> Rows:
        return Rows(opened.select_columns(list(columns.values())), columns, str(self._source), self._given or ())

    def _columns_of(self, opened: Any) -> dict[str, str]:
        """The column of every entry that a split has."""
        there, said = opened.column_names, self._columns
        missing = [column for entry, column in said.items() if column not in there and entry not in ("label", "target")]
        missing += [
            said[entry] for entry in ("label", "target") if entry in said and not self._is_known(said[entry], there)
        ]
        if missing:
            raise InputError(f"{self._source} has no column {', '.join(missing)}, which `columns` names; it has "
                             f"{', '.join(there)}.")  # fmt: skip
        same = {entry: entry for entry in self.entries if entry in there and entry not in said.values()}
        found = {entry: column for entry, column in {**same, **said}.items() if column in there}
        for entry in {"target", "positive"} & set(found):
            if is_blank(opened, found[entry]):
                del found[entry]
        if "image" in found:
            found = {entry: column for entry, column in found.items() if entry in ("image", "label") or entry in said}
        if not {"image", "text", "words"} & set(found):
            raise InputError(
                f"{self._source} has no column image, text or words; it has {', '.join(there)}. Say in `columns` which "
                f"column that is: `columns: {{{_likely(opened)}}}`."
            )
        return found

    def _is_known(self, column: str, there: Sequence[str]) -> bool:
        """Whether some split has a column, which others may lack; so too where not all of them can be looked at."""
        if column in there:
            return True
        try:
            splits = [self._source.peek(expression) for expression in self._source.named]
        except InputError:
            return True
        return any(split is None or column in split.column_names for split in splits)

    def _names(self, opened: Any) -> list[str]:
        return names_of(opened.features.get(self._columns.get("label", "label")))

    def _check_order(self, split: str, opened: Any) -> None:
        """Labels mean the same in every split."""
        names, expected = self._names(opened), self._names(self._source.open(self._source.first))
        if names and expected and names != expected:
            raise InputError(
                f"The split '{split}' of {self._source} numbers its classes otherwise than the first one: "
                f"{some(names)}, not {some(expected)}."
            )


def _absolute(path: str | Mapping[str, str]) -> str | dict[str, str]:
    if isinstance(path, Mapping):
        return {split: absolute(file) for split, file in path.items()}
    return absolute(path) if Path(path).expanduser().exists() else path


def _likely(opened: Any) -> str:
    """An entry of `columns` that may be meant: the first column of images or texts."""
    kinds = {"Image": "image", "string": "text", "large_string": "text"}
    for column, feature in opened.features.items():
        for kind in (type(feature).__name__, getattr(feature, "dtype", None)):
            if kind in kinds:
                return f"{kinds[kind]}: {column}"
    return "text: …"
