from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from adamerge.recorded import Recorded
from adamerge.types import Batch, TaskOutput, Term


class Objective(Recorded, nn.Module, ABC):
    """forward: (one task's output, its batch) -> named terms (sum, count).

    The loss adds weight * sum / count over tasks and terms.

    Args:
        weight: Factor of every term, dimensionless.
        task_weights: Further factors per task; tasks that are not named have 1.

    Attributes:
        needs: What the batch must hold beyond the inputs: "labels", "expert.logits", "expert.features" or
            "expert.blocks"; the last asks for `out.blocks` too. An instance may set it, as its options have it.
        filters: The count may differ from the number of samples, depending on the model's outputs; as `needs`.
        couples_batch: The sum is not one of independent samples (diversity, InfoNCE): never split into micro-batches.
    """

    needs: frozenset[str] = frozenset()
    filters: bool = False
    couples_batch: ClassVar[bool] = False

    def __init__(self, *, weight: float = 1.0, task_weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weight, self.task_weights = weight, dict(task_weights or {})

    def weight_of(self, task: str) -> float:
        """The factor of this objective's terms for a task."""
        return self.weight * self.task_weights.get(task, 1.0)

    @abstractmethod
    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        """Terms by name. `sum` is differentiable; `count` stays on the device and may be zero."""
