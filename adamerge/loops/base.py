from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from adamerge.recorded import Recorded
from adamerge.types import Batch

if TYPE_CHECKING:
    from adamerge.module import AdaMerge


class Loop(Recorded, ABC):
    """step: (module, {task: batch}) -> what `training_step` returns, a scalar with all gradients behind it.

    Attributes:
        smallest_batch: Samples that a task's batch must have.
    """

    smallest_batch: ClassVar[int] = 1

    def problems(self, module: "AdaMerge") -> Iterator[str]:
        """What in the module this loop cannot work with, one sentence each; asked before training. Default: nothing."""
        return iter(())

    def slot(self, step: int, tasks: Sequence[str], seed: int) -> tuple[int, Sequence[str]]:
        """Which step's batches an optimiser step takes, and of which tasks. Default: its own, of all tasks."""
        return step, tasks

    @abstractmethod
    def step(self, module: "AdaMerge", batches: Mapping[str, Batch]) -> Tensor:
        """One optimiser step's forwards and backwards."""
