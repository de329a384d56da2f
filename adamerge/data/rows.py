"""Rows of a table of Hugging Face `datasets`, as samples."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

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
        """That of `datasets`, which changes with whatever was done to the rows, and how they are read."""
        reading = [*self._columns.items(), *self._number]
        default = all(entry == column for entry, column in self._columns.items()) and not self._number
        return str(self._rows._fingerprint) + ("" if default else f" {reading}")

    @cached_property
    def labelled(self) -> bool:
        """Whether some row has a label, or a target."""
        known = [column for entry, column in self._columns.items() if entry in ("label", "target")]
        return any(self._is_given(column) for column in known)

    def _is_given(self, column: str) -> bool:
        import pyarrow as pa
        import pyarrow.compute as pc

        values = self._column(column)
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = pc.list_flatten(values)
        values = values.drop_null()
        return bool(pc.any(pc.greater_equal(values, 0)).as_py()) if pa.types.is_integer(values.type) else bool(values)

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
            if not (pa.types.is_list(words.type) or pa.types.is_large_list(words.type)):
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
        sample = {entry: row[column] for entry, column in self._columns.items()}
        empty = [entry for entry in ("text", "pair", "words", "target", "positive") if sample.get(entry, "") is None]
        if {"text", "words"} & set(empty):
            raise InputError(f"Sample {index} of {self._path} has no {empty[0]}; leave it out.")
        for entry in empty:
            sample[entry] = ""
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
        if isinstance(label, str):
            if label not in self._number:
                has = f"which is not in `classes`: {some(self._number)}" if self._number else "but there are no numbers"
                raise InputError(
                    f"Sample {index} of {self._path} is labelled {label!r}, {has}; list the labels in `classes`, in "
                    "the order that the expert numbers them in."
                )
            return self._number[label]
        if label is not None and not isinstance(label, int):
            raise InputError(
                f"Sample {index} of {self._path} is labelled {label!r}; labels are whole numbers: cast the column to "
                "ClassLabel."
            )
        return UNLABELED if label is None or label < 0 else int(label)
