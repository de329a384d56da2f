from abc import ABC
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import Tensor, nn

from adamerge.modules import Learnable
from adamerge.recorded import Recorded
from adamerge.types import TaskInfo


class TaskModule(Recorded, Learnable, ABC):
    """forward: features [B, D] -> [B, D] or logits [B, C], for one task, in fp32.

    Identity at the start where it claims so.

    Args:
        task: What may be known of the task.

    Attributes:
        axes: As in `MergeRule.axes`; usually empty, since there is one module per task and it is saved under the task's
            name.
    """

    given: ClassVar[int] = 1
    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}

    def __init__(self, task: TaskInfo) -> None:
        super().__init__()
        self.task, self.classes = task.name, tuple(task.classes or ())

    @property
    def num_classes(self) -> int | None:
        """C, where this module makes the logits. Default: as many as there are class names."""
        return len(self.classes) or None

    @property
    def inside(self) -> bool:
        """Whether `attach` changes the network, and so the features. Default: where it is overridden."""
        return type(self).attach is not TaskModule.attach

    @property
    def changes_head(self) -> bool:
        """Whether the task's head gives other logits than it was made for. Default: no."""
        return False

    def attach(self, net: nn.Module) -> AbstractContextManager[None]:
        """Change the network itself for the length of a block that spans forward and backward. Default: nothing."""
        return nullcontext()

    def forward(self, features: Tensor) -> Tensor:
        """Map features, [B, D] to [B, D] or [B, C]. Default: identity."""
        return features
