"""Which tensors of a network are merged, under which names, in which groups."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from adamerge.modules import identity
from adamerge.patterns import Pattern
from adamerge.types import InputError, some


@dataclass(frozen=True)
class ParamSpace:
    """The merged tensors of a network.

    Invariants, checked in `of()`: names are canonical (a tied tensor appears once, under its first name); every
    floating parameter is either in `shapes` or in `left_out`; groups are numbered in the order of their first tensor.

    Attributes:
        shapes: Merged tensors, in the network's order.
        group_of: Index of each merged tensor's group, in [0, G).
        group_names: The G names.
        aliases: Other names of tied tensors, to their canonical name; checkpoints may use any of them.
        buffers: Persistent buffers; the floating ones follow the `buffer_policy`.
        buffer_policy: `base` keeps the base's running statistics, `mean` averages the experts'.
        left_out: Parameters that keep the base's value, with the reason.
        skip: Regular expression of the names that are neither merged nor compared, in checkpoints too.
    """

    shapes: Mapping[str, torch.Size]
    group_of: Mapping[str, int]
    group_names: tuple[str, ...]
    aliases: Mapping[str, str]
    buffers: Mapping[str, torch.Size]
    buffer_policy: Literal["base", "mean"] = "base"
    left_out: Mapping[str, str] = ()  # type: ignore[assignment]
    skip: str | None = None

    @classmethod
    def of(
        cls,
        net: nn.Module,
        *,
        group: str = "tensor",
        skip: str | None = None,
        buffers: Literal["base", "mean"] = "base",
    ) -> "ParamSpace":
        """Read the space off a network.

        Args:
            net: The network; its values are not looked at.
            group: What shares one coefficient: `tensor`; `block` (the shortest prefix that ends in a number, else the
                module); `model`; or a regular expression: its first group, or else the whole match, names the group,
                and names without a match share the group `rest`.
            skip: Names that match keep the base's value.
            buffers: Policy for floating buffers (BatchNorm statistics).

        Raises:
            InputError: A bad regular expression, or nothing left to merge.
        """
        aliases: dict[str, str] = {}
        shapes: dict[str, torch.Size] = {}
        left_out: dict[str, str] = {}
        skips = Pattern(skip, "space.skip") if skip else None
        first_of: dict[Any, str] = {}
        for name, parameter in net.named_parameters(remove_duplicate=False):
            first = first_of.setdefault(identity(parameter), name)
            if first != name:
                aliases[name] = first
            elif skips and skips.search(name):
                left_out[name] = "skipped"
            elif not parameter.is_floating_point():
                left_out[name] = "not floating"
            else:
                shapes[name] = parameter.shape
        if not shapes:
            raise InputError(
                "No tensor is left to merge: the network has no floating parameter that `space.skip` lets pass."
            )
        kept: dict[str, torch.Size] = {}
        for name, buffer in net.named_buffers(remove_duplicate=False):
            first = first_of.setdefault(identity(buffer), name)
            if first != name:
                aliases[name] = first
            elif _persistent(net, name) and not (skips and skips.search(name)):
                kept[name] = buffer.shape
        space = cls(shapes, {}, (), aliases, kept, buffers, left_out, skip)._grouped(_namer(group))
        if space.group_names == ("rest",):
            raise InputError(
                f"`space.group` is '{group}', which matches no tensor; see `tensor`, `block`, `model` or mend it."
            )
        return space

    def without(self, names: Iterable[str], reason: str) -> "ParamSpace":
        """The same space with some tensors left out; their groups go when they were the last in them."""
        names = set(names)
        shapes = {name: shape for name, shape in self.shapes.items() if name not in names}
        if not shapes:
            raise InputError(f"No tensor is left to merge: all are left out ({reason}).")
        left_out = {**self.left_out, **{name: reason for name in self.shapes if name in names}}
        return replace(self, shapes=shapes, left_out=left_out)._grouped(
            lambda name: self.group_names[self.group_of[name]]
        )

    def apart(self, reasons: Mapping[str, str]) -> "ParamSpace":
        """The same space without tensors that checkpoints may lack, hold otherwise, or hold beside the network's.

        A further name of a tied tensor is passed over, unless the tensor goes itself: checkpoints hold it once.
        """
        space, reasons = self, {name: why for name, why in reasons.items() if self.aliases.get(name, name) in reasons}
        for reason in dict.fromkeys(reasons.values()):
            names = {alias for name, why in reasons.items() if why == reason for alias in self._all_names(name)}
            space = space.without(names, reason) if names & set(space.shapes) else space
        return replace(space, left_out={**space.left_out, **reasons})

    def _all_names(self, name: str) -> list[str]:
        return self.names_of(self.aliases.get(name, name))

    def checkpoint_names(self) -> dict[str, list[str]]:
        """For each merged tensor and buffer the names a checkpoint may hold it under, the canonical one first."""
        return {name: self.names_of(name) for name in (*self.shapes, *self.buffers)}

    def skipper(self) -> Callable[[str], bool]:
        """Return a function that tells whether a name is skipped."""
        pattern = Pattern(self.skip, "space.skip") if self.skip else None
        return lambda name: pattern is not None and pattern.search(name) is not None

    def names_of(self, name: str) -> list[str]:
        """The names that a checkpoint may hold any tensor under, merged or not, the canonical one first."""
        return [name, *(alias for alias, first in self.aliases.items() if first == name)]

    @property
    def num_elements(self) -> int:
        """P, the number of merged elements."""
        return sum(shape.numel() for shape in self.shapes.values())

    def describe(self) -> str:
        """One line for the plan; what is left out is said with its reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        out = "".join(f"; {reason}: {some(names)}" for reason, names in reasons.items())
        return f"{len(self.shapes)} tensors ({self.num_elements:,} elements) in {len(self.group_names)} groups{out}"

    def _grouped(self, name_of: Callable[[str], str]) -> "ParamSpace":
        groups: dict[str, int] = {}
        group_of = {name: groups.setdefault(name_of(name), len(groups)) for name in self.shapes}
        return replace(self, group_of=group_of, group_names=tuple(groups))


def _persistent(net: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in net.get_submodule(path)._non_persistent_buffers_set


def _namer(group: str) -> Callable[[str], str]:
    if group == "tensor":
        return lambda name: name
    if group == "model":
        return lambda name: "model"
    if group == "block":
        return _block_of
    pattern = Pattern(group, "space.group")

    def name_of(name: str) -> str:
        match = pattern.search(name)
        if match is None:
            return "rest"
        return (match.group(1) if pattern.groups else match.group(0)) or "rest"

    return name_of


def _block_of(name: str) -> str:
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name
