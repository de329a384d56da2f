from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from adamerge.data.base import MissingSplit, TaskData, TensorTask
from adamerge.demo import digits
from adamerge.types import InputError


class Digits(TaskData):
    """A task over scikit-learn's handwritten digits; splits train (797 scans), unlabeled (500) and test (500).

    Args:
        task: digit, turned, inverted, parity or large.

    Raises:
        InputError: Another task.
    """

    repeatable = True

    def __init__(self, task: str) -> None:
        if task not in digits.TASKS:
            raise InputError(f"The digits have the tasks {', '.join(digits.TASKS)}; asked for '{task}'.")
        self._task = task

    @property
    def classes(self) -> Sequence[str]:
        return digits.CLASSES[self._task]

    def split(self, name: str) -> Dataset[Mapping[str, Any]]:
        if name not in digits.SPLITS:
            raise MissingSplit(f"The digits have the splits {', '.join(digits.SPLITS)}; asked for '{name}'.")
        return TensorTask(self.classes, **{name: digits.samples(self._task, name)}).split(name)
