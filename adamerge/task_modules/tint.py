import difflib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adamerge.modules import identity, parameter_sites, swapped
from adamerge.task_modules.base import TaskModule
from adamerge.types import InputError, TaskInfo


class Tint(TaskModule):
    """A layer of the task's own: the shared layer's tensors, each with an offset added that is zero at the start.

    Args:
        task: The task, with its head and the network.
        layer: `head`, which need not be trainable itself, or the dotted name of a module of the network. All its
            parameters are offset, merged or not, also where they are tied to others.

    Raises:
        InputError: No such layer, or a layer without parameters.

    Source: Model Tinting (later SyMerge), arXiv 2412.19098, whose code tints the head. Deviation: an offset instead of
    a copy, which is the same as long as the head is not otherwise trained.
    """

    def __init__(self, task: TaskInfo, *, layer: str = "head") -> None:
        super().__init__(task)
        # in a tuple, since the head is the chain's; the chain is copied as a whole, and this follows
        self._layer, self._head = layer, (task.head,) if layer == "head" and task.head is not None else ()
        found = self._head[0] if self._head else _module_of(task, layer)
        names = list(parameter_sites(found))
        if not names:
            raise InputError(
                f"`layer` of Tint is '{layer}', for task '{task.name}' a {type(found).__name__} without parameters; "
                "name a layer that has some."
            )
        for name in names:
            offset = nn.Parameter(torch.zeros(found.get_parameter(name).shape))
            self.register_parameter(_attribute(name), offset)

    @property
    def inside(self) -> bool:
        return not self._head

    @property
    def changes_head(self) -> bool:
        return bool(self._head)

    @contextmanager
    def attach(self, net: nn.Module) -> Iterator[None]:
        root, layer = (self._head[0], self._head[0]) if self._head else (net, net.get_submodule(self._layer))
        sites = {identity(getattr(*places[0])): places for places in parameter_sites(root).values()}
        shared = {name: getattr(*places[0]) for name, places in parameter_sites(layer).items()}
        tinted = {name: self._tinted(name, tensor) for name, tensor in shared.items()}
        with swapped({name: sites[identity(tensor)] for name, tensor in shared.items()}, tinted):
            yield

    def _tinted(self, name: str, tensor: Tensor) -> Tensor:
        return (tensor + getattr(self, _attribute(name))).to(tensor.dtype)


def _attribute(name: str) -> str:
    return f"offset_{name.replace('.', '/')}"  # a parameter's name has no dots


def _module_of(task: TaskInfo, layer: str) -> nn.Module:
    if layer == "head" or task.net is None:
        what = "head" if layer == "head" else "net"
        raise InputError(f"`layer` of Tint is '{layer}', but `TaskInfo` of '{task.name}' has no `{what}`; give it one.")
    modules = dict(task.net.named_modules(remove_duplicate=False))
    if layer not in modules:
        near = ", ".join(difflib.get_close_matches(layer, filter(None, modules), cutoff=0))
        raise InputError(f"`layer` of Tint is '{layer}', which is no module of the network; the nearest are {near}.")
    return modules[layer]
