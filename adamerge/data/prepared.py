"""Samples as the network takes them, prepared once and remembered while memory lasts."""

import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Prepare = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Preparer = Callable[[str], Prepare]  # of a task


class Prepared(Dataset[Mapping[str, Any]]):
    """A data set whose samples go through `prepare`.

    What comes out is remembered where it is tensors and whole numbers of one shape, in memory that worker processes
    forked later share: each sample is decoded once per machine and rank, by whichever worker comes first.

    Args:
        samples: The raw samples.
        prepare: Deterministic.
        limit: Bytes that may be remembered; 0 for nothing.
    """

    def __init__(self, samples: Dataset[Mapping[str, Any]], prepare: Prepare, limit: int = 0) -> None:
        self._samples, self._prepare = samples, prepare
        self._memory: _Memory | None = None
        if limit:
            raw = samples[0]
            prepared = prepare(raw)
            if prepared is not raw:  # else they are remembered already
                self._memory = _Memory.for_samples(prepared, len(self), limit)

    def __len__(self) -> int:
        return len(self._samples)  # type: ignore[arg-type]

    @property
    def size(self) -> int:
        """Bytes set aside for remembered samples."""
        return self._memory.size if self._memory is not None else 0

    @property
    def remembers(self) -> bool:
        """Samples are kept once they are prepared, so that nothing is drawn at random for them."""
        return self._memory is not None

    @property
    def fingerprint(self) -> str | None:
        """Of the raw samples; None where it is not known."""
        return getattr(self._samples, "fingerprint", None)

    @property
    def labelled(self) -> bool | None:
        """Whether some raw sample has a label; None where it is not known."""
        return getattr(self._samples, "labelled", None)

    @property
    def lengths(self) -> Sequence[int] | None:
        """Of the raw samples; None where they have none."""
        return getattr(self._samples, "lengths", None)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if self._memory is None:
            return self._prepare(self._samples[index])
        found = self._memory.get(index)
        if found is None:
            found = self._prepare(self._samples[index])
            self._memory.put(index, found)
        return found

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Several samples; those that are not remembered are read together, where the data can."""
        held = self._memory.get if self._memory is not None else lambda index: None
        found = {index: held(index) for index in indices}
        missing = [index for index, sample in found.items() if sample is None]
        together = getattr(self._samples, "__getitems__", None)
        raw = together(missing) if together is not None and missing else map(self._samples.__getitem__, missing)
        for index, sample in zip(missing, raw, strict=True):
            prepared = found[index] = self._prepare(sample)
            if self._memory is not None:
                self._memory.put(index, prepared)
        return [found[index] for index in indices]  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}  # a worker that is not forked cannot share it


class _Memory:
    """N samples of one layout in shared anonymous memory, each with a flag that it is there."""

    def __init__(self, layout: Mapping[str, tuple[torch.Size, torch.dtype]], number: int) -> None:
        self._layout = dict(layout)
        self._columns = {name: _shared((number, *shape), dtype) for name, (shape, dtype) in layout.items()}
        self._there = _shared((number,), torch.bool)

    @classmethod
    def for_samples(cls, sample: Mapping[str, Any], number: int, limit: int) -> "_Memory | None":
        """Memory for samples like this one; None where they have no fixed layout or do not fit."""
        layout = {name: _layout(value) for name, value in sample.items()}
        known = {name: each for name, each in layout.items() if each is not None}
        size = number * sum(shape.numel() * dtype.itemsize for shape, dtype in known.values())
        return cls(known, number) if len(known) == len(layout) and 0 < size <= limit else None

    @property
    def size(self) -> int:
        return sum(column.nbytes for column in self._columns.values())

    def get(self, index: int) -> Mapping[str, Any] | None:
        if not self._there[index]:
            return None
        held = {name: column[index] for name, column in self._columns.items()}
        return {name: value if value.dim() else value.item() for name, value in held.items()}

    def put(self, index: int, sample: Mapping[str, Any]) -> None:
        if self._layout == {name: _layout(value) for name, value in sample.items()}:
            for name, column in self._columns.items():
                column[index] = sample[name]
            self._there[index] = True  # last: two workers may write the same bytes, none reads half a sample


def _layout(value: Any) -> tuple[torch.Size, torch.dtype] | None:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    return (torch.Size(), torch.int64) if isinstance(value, int) else None


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that forked processes share; pages take memory when they are first written."""
    size = max(1, torch.Size(shape).numel() * dtype.itemsize)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype, count=torch.Size(shape).numel()).view(shape)
