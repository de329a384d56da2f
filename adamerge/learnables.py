"""The learnables of a merged model by stable names, and their alignment with saved ones by task and group name."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adamerge.merged import MergedModel
from adamerge.rules import MergeRule
from adamerge.task_modules import TaskModule
from adamerge.types import InputError, some


class Learned(NamedTuple):
    """A trained parameter, or a buffer that moves with it, and what its axes run over."""

    parameter: Tensor
    axes: tuple[str | None, ...]


def learnables_of(model: MergedModel) -> dict[str, Learned]:
    """Names that survive a reordering of the tasks: `rule.NAME` and `task.TASK.PLACE.NAME`."""
    parts: list[tuple[str, MergeRule | TaskModule]] = [("rule", model.rule)]
    parts += [(f"task.{task}.{place}", part) for task in model.tasks for place, part in enumerate(model.chain(task))]
    found: dict[str, Learned] = {}
    for prefix, part in parts:
        kept = set(part.state_dict())  # without buffers that are not persistent
        tensors = [*part.named_parameters(), *part.named_buffers()]
        found |= {f"{prefix}.{name}": Learned(t, part.axes.get(name, ())) for name, t in tensors if name in kept}
    ours = {id(p) for p in (*model.trainable().values(), *model.rule.parameters())}  # fixed coefficients too
    return {name: each for name, each in found.items() if id(each.parameter) in ours or not _is_parameter(each)}


def _is_parameter(learned: Learned) -> bool:
    return isinstance(learned.parameter, nn.Parameter)


def labels_of(model: MergedModel) -> dict[str, list[str]]:
    """The names along each kind of axis."""
    return {"task": list(model.rule.tasks), "group": list(model.rule.groups)}


def train_only(model: MergedModel, pattern: str | None) -> None:
    """Train the learnables whose names match from their beginning, and no others; None for all.

    Raises:
        InputError: No regular expression, or one that matches nothing.
    """
    trainable = set(map(id, model.trainable().values()))
    names = {n: each.parameter for n, each in learnables_of(model).items() if id(each.parameter) in trainable}
    try:
        chosen = [name for name in names if pattern is None or re.match(pattern, name)]
    except re.error as error:
        raise InputError(f"`train` is no regular expression: '{pattern}' ({error}).") from error
    if names and not chosen:
        raise InputError(f"`train` is '{pattern}', which matches no learnable; there are {some(names)}.")
    for name, parameter in names.items():
        parameter.requires_grad_(name in chosen)


def trained_names(model: MergedModel) -> tuple[str, ...]:
    """The names of the learnables that are trained now."""
    return tuple(name for name, each in learnables_of(model).items() if each.parameter.requires_grad)


def saved_state_of(model: MergedModel) -> dict[str, Tensor]:
    """As `state_of`, in the types that they are saved in."""
    kinds = {f"rule.{prefix}": dtype for prefix, dtype in model.rule.saved_as.items()}
    return {
        name: tensor.to(next((dtype for prefix, dtype in kinds.items() if name.startswith(prefix)), tensor.dtype))
        for name, tensor in state_of(model).items()
    }


def state_of(model: MergedModel) -> dict[str, Tensor]:
    """Copies of all learnables on the CPU."""
    return {name: learned.parameter.detach().cpu().clone() for name, learned in learnables_of(model).items()}


@torch.no_grad()
def load_state(
    model: MergedModel,
    state: Mapping[str, Tensor],
    labels: Mapping[str, Sequence[str]],
    source: str,
    *,
    whole: bool = True,
) -> None:
    """Copy saved learnables into the model, rows and columns matched by name.

    Args:
        model: Where to.
        state: By name, as `state_of` gives them.
        labels: The names along their axes, as `labels_of` gave them then.
        source: What messages call the state.
        whole: All of the model's learnables must be there; else the others stay as they are.

    Raises:
        InputError: Other learnables, tasks, groups or shapes than the model's.
    """
    wanted, now = learnables_of(model), labels_of(model)
    if not whole:
        wanted = {name: learned for name, learned in wanted.items() if name in state}
    if set(wanted) != set(state):
        missing, extra = some(sorted(set(wanted) - set(state))), some(sorted(set(state) - set(wanted)))
        raise InputError(f"{source} does not hold this merge's learnables: missing {missing}, unknown {extra}.")
    for name, (parameter, axes) in wanted.items():
        tensor = state[name]
        orders = [_order(now[kind], labels[kind], kind, source) if kind is not None else None for kind in axes]
        if tensor.shape != parameter.shape:
            raise InputError(
                f"{source}: '{name}' has the shape {list(tensor.shape)}, this merge needs {list(parameter.shape)}."
            )
        for axis, order in enumerate(orders):
            tensor = tensor if order is None else tensor.index_select(axis, order)
        parameter.copy_(tensor)


def check_values(model: MergedModel, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse saved learnables that no run has saved.

    Args:
        model: Whose learnables they are.
        state: By name, as `state_of` gives them.
        source: What messages call the state.

    Raises:
        InputError: Values that are not finite, or of another kind of number than the model's.
    """
    wanted = learnables_of(model)
    for name, tensor in state.items():
        if name in wanted and _kind(tensor) != _kind(wanted[name].parameter):
            raise InputError(
                f"{source}: '{name}' is of the type {str(tensor.dtype).removeprefix('torch.')}, and must be of a type "
                f"such as {str(wanted[name].parameter.dtype).removeprefix('torch.')}. Copy the merge again."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{source}: '{name}' holds NaN or Inf, which no run saves. Copy the merge again.")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _order(now: Sequence[str], saved: Sequence[str], kind: str, source: str) -> Tensor:
    if set(now) != set(saved):
        missing, extra = some(sorted(set(now) - set(saved))), some(sorted(set(saved) - set(now)))
        raise InputError(
            f"{source} was learned for other {kind}s: it lacks {missing} and has {extra} that this merge does not."
        )
    place = {name: index for index, name in enumerate(saved)}
    return torch.tensor([place[name] for name in now])
