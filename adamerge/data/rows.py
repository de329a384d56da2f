"""Rows of a table of Hugging Face `datasets`, as samples."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data.pictures import check_size
from adamerge.types import UNLABELED, InputError, some


class Rows(Dataset[Mapping[str, Any]]):
    """The rows of an opened split.

    Args:
        rows: A `datasets.Dataset` with these columns.
        columns: The column of every entry of a sample.
        path: Where they are from, for messages.
        classes: What labels in words are numbered by.
    """

    def __init__(self, rows: Any, columns: Mapping[str, str], path: str, classes: Sequence[str] = ()) -> None:
        self._rows, self._columns, self._path = rows, dict(columns), path
        self._number = {name: number for number, name in enumerate(classes)}

    @property
    def fingerprint(self) -> str:
        """The fingerprint of `datasets`, which changes with all that was done to the rows, and how they are read."""
        reading = [*self._columns.items(), *self._number]
        default = all(entry == column for entry, column in self._columns.items()) and not self._number
        return str(self._rows._fingerprint) + ("" if default else f" {reading}")

    @cached_property
    def labelled(self) -> bool:
        """True where some row has a label, or a target."""
        if "target" in self._columns and len(self):
            return True
        return "label" in self._columns and self._has_label(self._columns["label"])

    def _has_label(self, column: str) -> bool:
        import pyarrow.compute as pc

        values = self._column(column)
        while _is_list(values):
            values = pc.list_flatten(values)
        values = values.drop_null()
        if _is_number(values):
            return bool(pc.any(pc.greater_equal(values, 0)).as_py())
        return bool(pc.any(pc.not_equal(values, "")).as_py()) if _is_text(values) else len(values) > 0

    def check(self) -> None:
        """Look, undecoded, for samples that cannot be drawn.

        Raises:
            InputError: A sample lacks what every one needs, or has a label that is not among the given classes.
        """
        for entry, column in self._columns.items():
            missing = None if entry in ("pair", "label") else first_blank(self._rows, column)
            if missing is not None:
                raise InputError(self._lacks(missing, entry))
        if "label" in self._columns and self._number:
            self._check_labels(self._column(self._columns["label"]))

    def _check_labels(self, values: Any) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        row = None
        if _is_list(values):
            values = values.combine_chunks()
            values, row = pc.list_flatten(values), pc.list_parent_indices(values)
        if _is_number(values):
            odd = pc.greater_equal(values, len(self._number))
            if pa.types.is_floating(values.type):
                odd = pc.or_(odd, pc.not_equal(pc.floor(values), values))
                odd = pc.and_(odd, pc.invert(pc.is_nan(values)))
        elif _is_text(values):
            odd = pc.invert(pc.is_in(values, value_set=pa.array(["", *self._number], values.type), skip_nulls=True))
            odd = pc.and_(odd, pc.is_valid(values))
        else:
            return
        position = pc.index(odd, True).as_py()
        if position >= 0:
            self._label(position if row is None else row[position].as_py(), values[position].as_py())

    def _lacks(self, index: int, entry: str) -> str:
        fix = "leave such samples out, or fill it" if entry in ("target", "positive") else "leave it out"
        return f"Sample {index} of {self._path} has no {entry}; {fix}."

    @cached_property
    def lengths(self) -> Tensor | None:
        """The characters of text and pair, or the number of words, [N]; None for images."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if "image" in self._columns:
            return None
        if "text" in self._columns:
            texts = [self._column(self._columns[entry]) for entry in ("text", "pair") if entry in self._columns]
            counts = [pc.utf8_length(text.cast(pa.large_string())) for text in texts]
        else:
            words = self._column(self._columns["words"])
            if not _is_list(words):
                raise InputError(f"The column '{self._columns['words']}' of {self._path} holds no lists of words.")
            counts = [pc.list_value_length(words)]
        found = [torch.from_numpy(count.fill_null(0).to_numpy().astype("int64")) for count in counts]
        return torch.stack(found).sum(0)

    def _column(self, name: str) -> Any:
        """A column as Arrow holds it, undecoded."""
        return self._rows.select_columns([name]).with_format("arrow")[:][name]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        try:
            row = self._rows[index]
            _check_pictures(row.values())
        except Exception as error:  # what decodes a damaged picture or text fails in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"Sample {index} of {self._path} cannot be decoded ({reason}); leave it out.") from error
        return self._sample(index, row)

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Several samples, which `datasets` reads faster together; torch's loader asks so."""
        try:
            columns = self._rows[indices]
            for values in columns.values():
                _check_pictures(values)
        except Exception:  # one of them; which one is said
            return [self[index] for index in indices]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [self._sample(index, row) for index, row in zip(indices, rows, strict=True)]

    def _sample(self, index: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
        sample = {entry: row[column] for entry, column in self._columns.items()}
        for entry in ("text", "words", "target", "positive"):
            if sample.get(entry, "") is None:
                raise InputError(self._lacks(index, entry))
        if sample.get("pair", "") is None:
            sample["pair"] = ""
        if "label" in sample or not {"target", "positive"} & set(sample):
            sample["label"] = self._labels(index, sample)
        return sample

    def _labels(self, index: int, sample: Mapping[str, Any]) -> int | list[int]:
        """One label, or one for each of the words; -100 where there is none."""
        label, words = sample.get("label"), sample.get("words")
        if words is None:
            return self._label(index, label)
        labels = [None] * len(words) if label is None else label
        if not isinstance(labels, list) or len(labels) != len(words):
            raise InputError(
                f"Sample {index} of {self._path} has {len(words)} words, but is labelled {label!r}; it takes a label "
                "for each of the words."
            )
        return [self._label(index, each) for each in labels]

    def _label(self, index: int, label: Any) -> int:
        if label is None or (isinstance(label, float) and math.isnan(label)):
            return UNLABELED
        if isinstance(label, str):
            if label not in self._number:
                if not label:
                    return UNLABELED
                has = f"which is not in `classes`: {some(self._number)}" if self._number else "but there are no numbers"
                raise InputError(
                    f"Sample {index} of {self._path} is labelled {label!r}, {has}; list the labels in `classes`, in "
                    "the order that the expert numbers them in."
                )
            return self._number[label]
        if not isinstance(label, int) and not (isinstance(label, float) and label.is_integer()):
            raise InputError(
                f"Sample {index} of {self._path} is labelled {label!r}; labels are whole numbers: cast the column to "
                "ClassLabel."
            )
        if self._number and label >= len(self._number):
            raise InputError(
                f"Sample {index} of {self._path} is labelled {int(label)}, but the {len(self._number)} `classes` are "
                f"numbered from 0 on: {some(self._number)}; list all of them, or leave the sample out."
            )
        return UNLABELED if label < 0 else int(label)


def first_blank(rows: Any, column: str) -> int | None:
    """The first row of a `datasets.Dataset` that has nothing in a column; None where there is no such row."""
    import pyarrow.compute as pc

    missing = _blanks(rows, column)
    found = -1 if missing is None else pc.index(missing, True).as_py()
    return None if found < 0 else int(found)


def is_blank(rows: Any, column: str) -> bool:
    """Tell whether a column of a `datasets.Dataset` is empty in every row; False where there are no rows."""
    import pyarrow.compute as pc

    missing = _blanks(rows, column)
    return missing is not None and len(missing) > 0 and bool(pc.all(missing).as_py())


def _blanks(rows: Any, column: str) -> Any:
    """For every row whether it has nothing in a column, without reading what it has; None if the table has no nulls."""
    import pyarrow.compute as pc

    values = rows.data.column(column)
    if not values.null_count:
        return None
    missing, order = pc.is_null(values), rows._indices
    return missing if order is None else missing.take(order.column(0))


def _check_pictures(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, Image.Image):
            check_size(value)


def _is_list(values: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(values.type) or pa.types.is_large_list(values.type))


def _is_number(values: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(values.type) or pa.types.is_floating(values.type))


def _is_text(values: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(values.type) or pa.types.is_large_string(values.type))
