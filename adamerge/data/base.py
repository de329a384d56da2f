import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.recorded import Recorded, digest_of_tensor
from adamerge.types import InputError


class MissingSplit(InputError):
    """There is no such split: a task whose evaluation split is missing is not scored."""


def is_known(samples: Dataset[Mapping[str, Any]]) -> bool:
    """Other runs know these samples again, by their fingerprint."""
    return isinstance(getattr(samples, "fingerprint", None), str)


def samples_key(samples: Dataset[Mapping[str, Any]], unknown: Any = None) -> list[Any]:
    """What prepared samples depend on, as plain data; the first of them speaks for the preprocessing.

    Args:
        samples: At least one.
        unknown: Stands for the fingerprint of samples that have none.
    """
    first = {name: digest_of_tensor(value) for name, value in samples[0].items() if isinstance(value, Tensor)}
    fingerprint = samples.fingerprint if is_known(samples) else unknown  # type: ignore[attr-defined]
    return [fingerprint, len(samples), first]  # type: ignore[arg-type]


class TaskData(Recorded, ABC):
    """One task's data: split: name -> map-style dataset of {"label": int, ...: tensors or what a backbone prepares}.

    Samples may lack "label". A dataset may have attributes that say more of it:

    * `fingerprint`, a text that changes with the samples, lets other runs find what was computed from them;
    * `labelled`, true where some sample has a label; where it is not, a few samples are looked at;
    * `lengths`, N whole numbers: samples of like length then share a batch.

    Attributes:
        repeatable: A sample is the same whenever it is asked for, so that it may be remembered once it is prepared.
    """

    repeatable: ClassVar[bool] = False

    @property
    @abstractmethod
    def classes(self) -> Sequence[str]:
        """The C class names, in the order of the labels; none where they are not known."""

    def peek(self, split: str) -> Sequence[str]:
        """The class names, for which nothing large is fetched or read; and what is seen to be wrong with a split.

        Raises:
            MissingSplit: No such split.
            InputError: The split or the classes cannot be had. Default: the classes alone are looked at.
        """
        return self.classes

    @abstractmethod
    def split(self, name: str) -> Dataset[Mapping[str, Any]]:
        """The samples of a split.

        Raises:
            MissingSplit: No such split.
            InputError: It cannot be read.
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

    def peek(self, split: str) -> Sequence[str]:
        self.split(split)
        return self.classes

    def split(self, name: str) -> Dataset[Mapping[str, Any]]:
        if name not in self._splits:
            raise MissingSplit(f"There is no split '{name}'; there are {', '.join(self._splits)}.")
        return _Tensors(*self._splits[name])


class _Tensors(Dataset[Mapping[str, Any]]):
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self._inputs, self._labels = inputs, labels

    @cached_property
    def fingerprint(self) -> str:
        """Of the values."""
        found = hashlib.sha256()
        for tensor in (self._inputs, self._labels):
            found.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    @property
    def labelled(self) -> bool:
        """Whether some label is one."""
        return bool((self._labels >= 0).any())

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"input": self._inputs[index], "label": int(self._labels[index])}
