"""How modules hold frozen tensors, keep learnables in fp32, and have their parameters swapped for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FrozenStore(nn.Module):
    """Holds tensors that nothing may train, save or broadcast: no parameters, no buffers, no state.

    It follows `.to()` by device only; dtypes are chosen once, at load.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            self._move(device)
            self.device = device
        return self

    def _move(self, device: torch.device) -> None:
        """Bring the tensors to a device."""


class Learnable(nn.Module):
    """A module whose parameters stay fp32 whatever the trainer's precision; they follow `.to()` by device only."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)


def identity(tensor: Tensor) -> Any:
    """Equal for tensors that share their memory, whether or not they are one object: what makes a tie."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


Sites = Mapping[str, list[tuple[nn.Module, str]]]


def parameter_sites(net: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each canonical parameter name all places (module, attribute) that hold it, tied ones together."""
    first: dict[Any, str] = {}
    sites: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in net.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = first.setdefault(identity(parameter), f"{prefix}.{attribute}" if prefix else attribute)
                if all(place != (module, attribute) for place in sites.setdefault(name, [])):
                    sites[name].append((module, attribute))
    return sites


def put(module: nn.Module, attribute: str, tensor: Tensor | None) -> None:
    """Set a parameter's place to a tensor or to nothing; recurrent modules keep a second list, which follows."""
    module._parameters[attribute] = tensor  # type: ignore[assignment]
    names = getattr(module, "_flat_weights_names", ())
    if attribute in names:
        flat: Any = module._flat_weights
        flat[names.index(attribute)] = tensor


@contextmanager
def swapped(sites: Sites, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters, at every site, for the length of the block.

    The block must span forward and backward: activation checkpointing runs the forward again during backward, and would
    silently see the old values (tests/test_engine.py shows it).
    """
    held = [(module, attribute, module._parameters[attribute]) for name in tensors for module, attribute in sites[name]]
    try:
        for name, tensor in tensors.items():
            for module, attribute in sites[name]:
                put(module, attribute, tensor)
        yield
    finally:
        for module, attribute, parameter in held:
            put(module, attribute, parameter)
