from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adamerge.backbones.base import Backbone
from adamerge.blocks import block_names
from adamerge.checkpoints import State, absolute
from adamerge.hub import hub_id
from adamerge.task_modules import LinearHead, TaskModule
from adamerge.types import Batch, InputError, TaskInfo


class Module(Backbone):
    """Any `nn.Module`.

    Args:
        build: Makes the network; a class or function.
        build_args: Its arguments: `{model_name: resnet50, num_classes: 0}` for `timm.create_model`.
        features: Name of the method that maps the input to features [B, D]; by default the network is called itself.
        input: Which entry of the batch is handed to the network.
        heads: Prefix of a linear head's tensors in each expert's checkpoint (`head.` reads `head.weight` and
            `head.bias`), or a checkpoint with such tensors for each task.
        train_heads: Train the heads along with the merge; they are frozen otherwise.
        blocks: Regular expression of the whole names of the network's blocks; by default the parts of its largest
            `nn.ModuleList`, else `nn.Sequential`.

    Raises:
        InputError: `build` is a network already, or does not take `build_args`.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        *,
        build_args: Mapping[str, Any] | None = None,
        features: str | None = None,
        input: str = "input",
        heads: str | Mapping[str, str] = "head.",
        train_heads: bool = False,
        blocks: str | None = None,
    ) -> None:
        if isinstance(build, nn.Module):  # also of a function under `class_path`, which the parser calls
            raise InputError(
                f"`backbone.build` is a {type(build).__name__} already: name the class or function that makes it, as "
                "in `build: timm.create_model`, and its arguments in `backbone.build_args`."
            )
        if not isinstance(heads, str):  # found again from any working directory
            heads = self._arguments["heads"] = {task: absolute(str(path)) for task, path in heads.items()}
        self._build: Callable[..., nn.Module] = build
        self._build_args = dict(build_args or {})
        self._features, self._input, self._heads = features, input, heads
        self._train_heads, self._blocks = train_heads, blocks

    def build(self) -> nn.Module:
        try:
            net = self._build(**self._build_args)
        except TypeError as error:
            raise InputError(
                f"`backbone.build` does not make a network: {error}. Give it its arguments in `backbone.build_args`."
            ) from error
        if self._features and not callable(getattr(net, self._features, None)):
            raise InputError(f"`backbone.features` is '{self._features}', which is no method of {type(net).__name__}.")
        return net

    def blocks(self, net: nn.Module) -> Sequence[str]:
        return block_names(net, self._blocks)

    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        if self._input not in batch:
            raise InputError(f"`backbone.input` is '{self._input}', but a batch holds {', '.join(sorted(batch))}.")
        return (getattr(net, self._features) if self._features else net)(batch[self._input])

    def head(self, task: TaskInfo) -> TaskModule:
        if isinstance(self._heads, str):
            return LinearHead(task, prefix=self._heads, trainable=self._train_heads)
        if task.name not in self._heads:
            raise InputError(f"`backbone.heads` names no head for task '{task.name}'; it has {', '.join(self._heads)}.")
        return LinearHead(task, prefix="", path=self._heads[task.name], trainable=self._train_heads)

    def head_problems(self, task: str, state: State, classes: Sequence[str]) -> Iterator[str]:
        source = state.source if isinstance(self._heads, str) else self._heads.get(task, "")
        if not state.has_values or hub_id(source) is not None:
            return  # what is on the hub is not fetched for its head
        try:
            self.head(TaskInfo(task, tuple(classes), state))
        except InputError as error:
            yield str(error)

    def sources(self) -> Mapping[str, str]:
        return {} if isinstance(self._heads, str) else {f"head {task}": path for task, path in self._heads.items()}
