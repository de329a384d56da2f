from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.deltas import Deltas, DenseDeltas
from adamerge.task_vectors import TaskVectors
from adamerge.transforms.base import Transform


class ElectSign(Transform):
    """Elect one sign per entry by the tasks' summed mass and drop what disagrees with it.

    An entry whose sum is zero takes the majority sign of the whole model. The surviving vectors are left to be summed
    by the rule (AdaMerging++); there is no disjoint mean.

    Source: TIES-Merging, arXiv 2306.01708, second step.
    """

    def __init__(self) -> None:
        self._majority = 0.0

    def prepare(self, vectors: TaskVectors) -> None:
        balance = sum(int(_mass(vectors.deltas(name)).sign().sum()) for name in vectors.space.shapes)
        self._majority = float((balance > 0) - (balance < 0))

    def __call__(self, name: str, deltas: Deltas, generators: Sequence[torch.Generator]) -> Deltas:
        elected = _mass(deltas).sign()
        elected = torch.where(elected == 0, self._majority, elected)
        delta_TS = deltas.dense()
        return DenseDeltas(torch.where(delta_TS * elected > 0, delta_TS, 0))


def _mass(deltas: Deltas) -> Tensor:
    """Sum of the task vectors, [*S], accumulated in at least fp32."""
    return deltas.combine(torch.ones(deltas.num_tasks, device=deltas.device))
