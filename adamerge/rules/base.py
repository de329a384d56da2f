from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from adamerge.deltas import Deltas
from adamerge.modules import Learnable
from adamerge.recorded import Recorded
from adamerge.task_vectors import TaskVectors


class MergeRule(Recorded, Learnable, ABC):
    """merge: (base [*S], deltas [T, *S]) -> merged [*S], differentiable in self.parameters(). Learnables are fp32.

    Args:
        vectors: Task vectors to merge; a rule takes sizes and names from them and keeps no reference.

    Attributes:
        saved_as: The type that parameters are saved in, by the beginning of their names, where it is not their own.
        bounded: The beginnings of names of parameters that give finite weights whatever finite values they have.
        axes: For each parameter, which of its axes run over `task` or `group`; they are saved with the names, and
            loading aligns them by name.
    """

    given: ClassVar[int] = 1
    axes: Mapping[str, tuple[str | None, ...]] = MappingProxyType({})
    saved_as: Mapping[str, torch.dtype] = MappingProxyType({})
    bounded: Sequence[str] = ()

    def __init__(self, vectors: TaskVectors) -> None:
        super().__init__()
        self.tasks, self.groups = vectors.tasks, vectors.space.group_names

    def begin(self) -> Any:
        """What all tensors of one step share, computed once per step; handed to `merge`. Default: None."""

    @abstractmethod
    def merge(self, name: str, base: Tensor, deltas: Deltas, shared: Any) -> Tensor:
        """Merged weights of one tensor, [*S], in at least fp32; must not change its inputs."""

    def coefficients(self) -> Tensor | None:
        """The coefficients [T, G] that the merge uses, for plots and tables. Default: None, the rule has no such."""
        return None

    def draw_(self, seed: int | None) -> None:
        """Draw what is random in the merge from now on, the same for the same seed; None: draw nothing. Default: as is.

        A step under training draws, equal on all ranks; everything else that merges does not, and so can be repeated.
        """

    def project_(self) -> None:
        """Bring the learnables back into their set, in place, after an optimiser step. Default: nothing."""

    def penalty(self) -> Mapping[str, Tensor]:
        """Named scalars to add to the loss, differentiable in the learnables. Default: none."""
        return {}
