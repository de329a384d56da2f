from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from adamerge.blocks import block_names
from adamerge.checkpoints import State, open_headers, open_state
from adamerge.recorded import Recorded
from adamerge.task_modules import TaskModule
from adamerge.types import ROWS, Batch, InputError, TaskInfo
from adamerge.vocabulary import Vocabulary


class Backbone(Recorded, ABC):
    """What the engine must know of an architecture.

    build: () -> net; features: (net, batch) -> [B, D]; head: task -> the module that makes its logits.

    Attributes:
        has_heads: An exported folder holds the heads, or its library makes them.
        library: What loads an exported folder, as the hub names it.
    """

    has_heads: ClassVar[bool] = False
    library: ClassVar[str] = "pytorch"

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

    def bind(self, base: str) -> None:
        """Learn where the merge's base is, for backbones that take architecture and preprocessing from it."""

    def own(self, base: State) -> Mapping[str, str]:
        """The names of the tensors that are each task's own and not merged, with the reason. Default: none."""
        return {}

    def spare(self, name: str) -> bool:
        """Whether a tensor keeps the base's value where no expert has it. Default: none does."""
        return False

    def differences(self, source: str) -> Iterator[str]:
        """What makes a checkpoint's configuration another one than the network's. Default: nothing is known of it."""
        return iter(())

    @property
    def tokens_per_sample(self) -> int | None:
        """The tokens or patches of a sample at most, for estimates of time; None where they are not known."""
        return None

    def head_problems(self, task: str, state: State, classes: Sequence[str]) -> Iterator[str]:
        """What the headers of an expert's checkpoint tell against its head. Default: nothing."""
        return iter(())

    def vocabulary(self, source: str) -> Vocabulary | None:
        """The tokens of a checkpoint; None where it has no tokenizer. Default: None.

        Raises:
            InputError: It has one that cannot be read.
        """
        return None

    def token_tensors(self, net: nn.Module) -> Sequence[str]:
        """The names of the tensors with a row for each token. Default: none."""
        return ()

    def classes(self, source: str, given: Sequence[str]) -> Sequence[str]:
        """The class names of an expert's task: those of the data, if any, or else the expert's own.

        Raises:
            InputError: The data number the classes otherwise than the expert.
        """
        return given

    def heads(self, tasks: Sequence[TaskInfo]) -> dict[str, TaskModule]:
        """The heads of all tasks, for backbones that make them faster together."""
        return {task.name: self.head(task) for task in tasks}

    def open(self, source: str) -> State:
        """A checkpoint of the base or an expert, its tensors under the network's names. Default: `open_state`."""
        return open_state(source)

    def peek(self, source: str) -> State:
        """As `open`, for names, shapes and dtypes alone; nothing is fetched but headers.

        Default: `open` itself, where a backbone has one of its own.
        """
        return open_headers(source) if type(self).open is Backbone.open else self.open(source)

    def outline(self) -> nn.Module:
        """The network for its names and shapes alone. Default: as `build` makes it."""
        return self.build()

    def prepare(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        """A raw sample (a decoded image, a text) as the network takes it, deterministically. Default: as it is."""
        return sample

    def preparer(self, task: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
        """`prepare` for a task's samples. Default: the same for all."""
        return self.prepare

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Prepared samples as one batch, on the CPU, where they are read. Default: torch's own collation.

        A batch may hold `rows`, the places [N] of the answers among the flattened B · L tokens; features, logits and
        labels then have N rows in place of B.
        """
        return default_collate(list(samples))

    def export(self, net: nn.Module, base: State, folder: Path, heads: Mapping[str, TaskModule]) -> None:
        """Write a merged network, with all that its own library needs to load it, into an empty folder.

        Args:
            net: As `build` makes it, with the merged weights.
            base: The base's checkpoint, for what is not merged.
            folder: Where.
            heads: What makes each task's logits, for libraries whose models have heads.

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

    def answers(self, folder: Path, tasks: Sequence[str]) -> Mapping[str, Callable[[Batch], Tensor]]:
        """From batch to logits, for each task as an exported folder's own library gives them. Default: it has no heads.

        Args:
            folder: The folder.
            tasks: Of which tasks.
        """
        return {}

    def loading(self, task: str) -> str:
        """Python that answers for a task by an export's library alone; a line of it is `folder = "{folder}"`."""
        return ""

    def example(self, net: nn.Module, number: int) -> Batch:
        """Random input for a network of this backbone's, the same at every call, to compare an export on."""
        raise InputError(f"{type(self).__name__} does not say what its network takes.")

    def about(self, task: str) -> Mapping[str, Any]:
        """What a task's head is made from beside the class names, as plain data. Default: nothing."""
        return {}

    def sources(self) -> Mapping[str, str]:
        """Further files the answers depend on, by a name for each; hashed with the merge. Default: none."""
        return {}

    def made_of(self) -> Sequence[Any] | None:
        """What features and preprocessing depend on beside checkpoints and arguments, as plain data with digests.

        For what is kept for later runs. Default: None, it cannot be told, and less is kept.
        """
        return None

    def concatenate(self, batches: Sequence[Batch]) -> Batch:
        """Several tasks' batches as one, for networks that run faster on one large batch. Labels are left out.

        Raises:
            InputError: The tasks' inputs have different shapes.
        """
        try:
            return {key: torch.cat([batch[key] for batch in batches]) for key in _inputs(batches[0])}
        except (RuntimeError, TypeError, KeyError) as error:
            raise InputError(
                f"The tasks' batches cannot be concatenated ({error}); "
                "set `loop.order` to per_task and `apply_mode` to leaf."
            ) from error


def _inputs(batch: Batch) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "label" and not key.startswith("expert.")}


def input_shapes(batch: Batch) -> dict[str, Any]:
    """What a batch's inputs are but for their number: shape and type of each tensor, the type of anything else."""
    return {
        key: (value.shape[1:], value.dtype) if isinstance(value, Tensor) else type(value)
        for key, value in _inputs(batch).items()
    }


def input_size(batch: Batch) -> int:
    """How many numbers the tensors among a batch's inputs hold."""
    return sum(value.numel() for value in _inputs(batch).values() if isinstance(value, Tensor))


def batch_size(batch: Batch) -> int:
    """B, read off the first tensor of a batch.

    Raises:
        InputError: No tensor in it.
    """
    sizes = [len(value) for value in batch.values() if isinstance(value, Tensor)]
    if not sizes:
        raise InputError(f"A batch holds no tensor, only {', '.join(sorted(batch))}; the data set must give tensors.")
    return sizes[0]


def num_answers(batch: Batch) -> int:
    """N, the rows of features that a batch is answered with: B, or as many as it has `rows`."""
    return len(batch[ROWS]) if ROWS in batch else batch_size(batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device; other entries pass."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return {key: [*map(moved, value)] if isinstance(value, list) else moved(value) for key, value in batch.items()}
