from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from adamerge.deltas import Deltas
from adamerge.recorded import Recorded
from adamerge.task_vectors import TaskVectors


class Transform(Recorded, ABC):
    """(name, deltas [T, *S]) -> deltas [T, *S], tensor by tensor, without learnables; inputs are not changed."""

    def prepare(self, vectors: TaskVectors) -> None:
        """One pass over all names, for methods that look at the whole model. Default: nothing."""

    @abstractmethod
    def __call__(self, name: str, deltas: Deltas, generators: Sequence[torch.Generator]) -> Deltas:
        """Transform one tensor's vectors.

        Args:
            name: Canonical name of the tensor.
            deltas: Its T task vectors.
            generators: One per task, seeded by (seed, task, name); the only source of randomness allowed.
        """
