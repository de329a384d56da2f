import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.recorded import Recorded
from adamerge.types import InputError


class TaskData(Recorded, ABC):
    """One task's data: split: name -> map-style dataset of {"label": int, ...: tensors or what a backbone prepares}.

    A dataset with an attribute `fingerprint`, a text that changes with the samples, lets other runs find what was
    computed from them.

    Attributes:
        repeatable: A sample is the same whenever it is asked for, so that it may be remembered once it is prepared.
    """

    repeatable: ClassVar[bool] = False

    @property
    @abstractmethod
    def classes(self) -> Sequence[str]:
        """The C class names, in the order of the labels."""

    @abstractmethod
    def split(self, name: str) -> Dataset[Mapping[str, Any]]:
        """The samples of a split.

        Raises:
            InputError: No such split.
        """


class TensorTask(TaskData):
    """A task held in tensors.

    Args:
        classes: The C class names.
        **splits: For each split the inputs [N, …] and the labels [N].
    """

    repeatable = True

    def __init__(self, classes: Sequence[str], **splits: tuple[Tensor, Tensor]) -> None:
        self._classes, self._splits = tuple(classes), splits

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    def split(self, name: str) -> Dataset[Mapping[str, Any]]:
        if name not in self._splits:
            raise InputError(f"There is no split '{name}'; there are {', '.join(self._splits)}.")
        return _Tensors(*self._splits[name])


class _Tensors(Dataset[Mapping[str, Any]]):
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self._inputs, self._labels = inputs, labels

    @cached_property
    def fingerprint(self) -> str:
        """Of the values."""
        values = (tensor.contiguous().view(torch.uint8).numpy() for tensor in (self._inputs, self._labels))
        return hashlib.sha256(b"".join(map(bytes, values))).hexdigest()

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"input": self._inputs[index], "label": int(self._labels[index])}
