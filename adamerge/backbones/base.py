from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.blocks import block_names
from adamerge.checkpoints import State, open_state
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

    def blocks(self, net: nn.Module) -> Sequence[str]:
        """The modules that the network is a chain of, by name and in order, for what works block by block.

        Default: the largest list of modules in it.
        """
        return block_names(net)

    def heads(self, tasks: Sequence[TaskInfo]) -> dict[str, TaskModule]:
        """The heads of all tasks, for backbones that make them faster together."""
        return {task.name: self.head(task) for task in tasks}

    def open(self, source: str) -> State:
        """A checkpoint of the base or an expert, its tensors under the network's names. Default: `open_state`."""
        return open_state(source)

    def prepare(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        """A raw sample (a decoded image, a text) as the network takes it, deterministically. Default: as it is."""
        return sample

    def export(self, net: nn.Module, base: State, folder: Path) -> None:
        """Write a merged network, with all that its own library needs to load it, into an empty folder.

        Args:
            net: As `build` makes it, with the merged weights.
            base: The base's checkpoint, for what is not merged.
            folder: Where.

        Raises:
            InputError: This backbone has no layout that another library loads.
        """
        raise InputError(f"{type(self).__name__} has no layout of another library to export to; use `adamerge.load`.")

    def exported(self, folder: Path) -> nn.Module:
        """The network of an exported folder, loaded by its own library alone, as `build` makes it."""
        raise InputError(f"{type(self).__name__} has no layout of another library to load from.")

    def exported_heads(self, folder: Path, classes: Mapping[str, Sequence[str]]) -> Mapping[str, TaskModule]:
        """The heads of an exported folder as its own library makes them from class names. Default: it makes none."""
        return {}

    def example(self, net: nn.Module, number: int) -> Batch:
        """Random input for a network of this backbone's, the same at every call, to compare an export on."""
        raise InputError(f"{type(self).__name__} does not say what its network takes.")

    def about(self, task: str) -> Mapping[str, Any]:
        """What a task's head is made from beside the class names, as plain data. Default: nothing."""
        return {}

    def sources(self) -> Mapping[str, str]:
        """Further files the answers depend on, by a name for each; hashed with the merge. Default: none."""
        return {}

    def concatenate(self, batches: Sequence[Batch]) -> Batch:
        """Several tasks' batches as one, for networks that run faster on one large batch. Labels are left out.

        Raises:
            InputError: The tasks' inputs have different shapes.
        """
        keys = [key for key in batches[0] if key != "label" and not key.startswith("expert.")]
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

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return {key: [*map(moved, value)] if isinstance(value, list) else moved(value) for key, value in batch.items()}
