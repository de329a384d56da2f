from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.deltas import Deltas, DenseDeltas
from adamerge.task_vectors import TaskVectors
from adamerge.transforms.base import Transform
from adamerge.types import InputError

_HALF = 1 << 16


class Trim(Transform):
    """Keep each task's largest entries by magnitude, chosen over the whole model; zero the rest.

    Args:
        keep: Fraction of the merged entries kept per task, in (0, 1]. Entries that tie with the smallest kept one are
            kept too.

    Raises:
        InputError: `keep` outside (0, 1].

    Source: TIES-Merging, arXiv 2306.01708, first step; density 0.2 there. Deviation: tensors the loss cannot reach do
    not count. The threshold is the exact k-th largest magnitude in fp32, found without flattening the model: two
    histograms over the bits.
    """

    def __init__(self, *, keep: float = 0.2) -> None:
        if not 0 < keep <= 1:
            raise InputError(f"`Trim.keep` is {keep}; it is the fraction of entries kept, in (0, 1].")
        self.keep = keep
        self._threshold_T = torch.empty(0)

    def prepare(self, vectors: TaskVectors) -> None:
        num_tasks, total = len(vectors.tasks), vectors.space.num_elements
        rank = max(1, round(self.keep * total))  # the threshold is the rank-th largest
        high_T, rest_T = [0] * num_tasks, [rank] * num_tasks
        for half in ("high", "low"):
            count = torch.zeros(num_tasks, _HALF, dtype=torch.int64)
            for name in vectors.space.shapes:
                for task, bits in enumerate(_magnitude_bits(vectors.deltas(name).dense())):
                    picked = bits >> 16 if half == "high" else (bits & (_HALF - 1))[bits >> 16 == high_T[task]]
                    count[task] += torch.bincount(picked.reshape(-1), minlength=_HALF).cpu()
            for task in range(num_tasks):
                from_top = count[task].flip(0).cumsum(0)
                place = int(torch.searchsorted(from_top, rest_T[task]))
                if half == "high":
                    rest_T[task] -= int(from_top[place - 1]) if place else 0
                    high_T[task] = _HALF - 1 - place
                else:
                    high_T[task] = high_T[task] << 16 | (_HALF - 1 - place)
        self._threshold_T = torch.tensor(high_T, dtype=torch.int32).view(torch.float32)

    def __call__(self, name: str, deltas: Deltas, generators: Sequence[torch.Generator]) -> Deltas:
        delta_TS = deltas.dense()
        threshold = self._threshold_T.to(delta_TS.device).view(-1, *[1] * (delta_TS.dim() - 1))
        return DenseDeltas(torch.where(delta_TS.abs().float() >= threshold, delta_TS, 0))


def _magnitude_bits(delta_TS: Tensor) -> Tensor:
    """|x| in fp32 as integers of the same order."""
    return delta_TS.abs().float().view(torch.int32)
