"""A limit on the memory that a stranger's options may take: larger tensors are refused before they are made."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from adamerge.types import InputError

_MODULES = 1_000_000
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}  # with the places of their factors
_COPIES = {"clone", "_to_copy", "contiguous"}  # also of views, whose memory is smaller than their number of elements
_MAKERS = {  # functions that make a tensor of a size given in numbers, with the place of the size
    **dict.fromkeys(("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "empty_permuted"), 0),
    "eye": 2,  # of two axes
    **dict.fromkeys(("arange", "linspace", "logspace", "randperm"), -1),  # of one axis, by its numbers
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full", "repeat", "randint", "normal"), 1),
}


class _Sizes(TorchDispatchMode):
    """Checks the size of each tensor that is made from numbers, or that can be larger than its inputs."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        place = _MAKERS.get(name)
        size = _size(name, args, place) if place is not None else _grown(func, name, args)
        if size > self._limit:
            raise InputError(_refused("one tensor", size, self._limit))
        return func(*args, **(kwargs or {}))


def _grown(func: Any, name: str, args: Sequence[Any]) -> float:
    """Return the number of elements of a broadcast, a product or a copy; 0 for other functions."""
    if name in _PRODUCTS:
        one, other = (args[place] for place in _PRODUCTS[name])
        return math.prod((*one.shape[:-1], other.shape[-1]))
    if name not in _COPIES and torch.Tag.pointwise not in func.tags:
        return 0
    shapes = [each.shape for each in args if isinstance(each, Tensor)]
    axes = max(map(len, shapes), default=0)
    return math.prod(
        max((shape[-axis] for shape in shapes if axis <= len(shape)), default=1) for axis in range(1, axes + 1)
    )


def _size(name: str, args: Sequence[Any], place: int) -> float:
    """Return the largest number of elements that the arguments can ask for."""
    numbers = [each for each in args if isinstance(each, (int, float)) and not isinstance(each, bool)]
    sizes = [math.prod(each) for each in args if isinstance(each, (list, tuple)) and all(map(_is_int, each))]
    if place < 0:
        return max((abs(each) for each in numbers), default=0)
    if place == 2:
        return max(numbers, default=0) ** 2
    repeated = args[0].numel() if name == "repeat" else 1
    return repeated * max(sizes, default=0)


def _is_int(value: Any) -> bool:
    return isinstance(value, int)


def _refused(what: str, number: float, limit: int) -> str:
    return (
        f"{what} of {number:,.0f} elements is asked for, which the files of this merge have no use for (the limit is "
        f"{limit:,}): an option of the merge's record, or the configuration of its model, is wrong"
    )


@contextmanager
def budget(elements: int, modules: int = _MODULES) -> Iterator[None]:
    """Refuse, in the block, any tensor or sum of parameters of more elements than this, and more modules than this.

    Raises:
        InputError: In the block, before the memory is taken.
    """
    counts = {"modules": 0, "parameters": 0}

    def parameter(module: nn.Module, name: str, value: Any) -> None:
        counts["parameters"] += value.numel() if value is not None else 0
        if counts["parameters"] > elements:
            raise InputError(_refused("a network", counts["parameters"], elements))

    def submodule(module: nn.Module, name: str, value: Any) -> None:
        counts["modules"] += 1
        if counts["modules"] > modules:
            raise InputError(f"a network of more than {modules:,} modules is asked for: an option is wrong")

    hooks = [
        register_module_parameter_registration_hook(parameter),
        register_module_module_registration_hook(submodule),
    ]
    try:
        with _Sizes(elements):
            yield
    finally:
        for hook in hooks:
            hook.remove()
