from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adamerge.recorded import Recorded
from adamerge.task_modules import TaskModule
from adamerge.types import Batch, InputError, TaskInfo


class Backbone(Recorded, ABC):
    """What the engine must know of an architecture.

    build: () -> net; features: (net, batch) -> [B, D]; head: task -> the module that makes its logits.
    """

    @abstractmethod
    def build(self) -> nn.Module:
        """The network of the base and the experts, with any values: they are replaced by the checkpoints'."""

    @abstractmethod
    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        """Features [B, D] of a batch."""

    @abstractmethod
    def head(self, task: TaskInfo) -> TaskModule:
        """What turns a task's features into its logits."""

    def sources(self) -> Mapping[str, str]:
        """Further files the answers depend on, by a name for each; hashed with the merge. Default: none."""
        return {}

    def concatenate(self, batches: Sequence[Batch]) -> Batch:
        """Several tasks' batches as one, for networks that run faster on one large batch. Labels are left out.

        Raises:
            InputError: The tasks' inputs have different shapes.
        """
        keys = [key for key in batches[0] if key != "label"]
        try:
            return {key: torch.cat([batch[key] for batch in batches]) for key in keys}
        except (RuntimeError, TypeError, KeyError) as error:
            raise InputError(
                f"The tasks' batches cannot be concatenated ({error}); "
                "set `loop.order` to per_task and `apply_mode` to leaf."
            ) from error


def batch_size(batch: Batch) -> int:
    """B, read off the first tensor of a batch.

    Raises:
        InputError: No tensor in it.
    """
    sizes = [len(value) for value in batch.values() if isinstance(value, Tensor)]
    if not sizes:
        raise InputError(f"A batch holds no tensor, only {', '.join(sorted(batch))}; the data set must give tensors.")
    return sizes[0]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device; other entries pass."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
