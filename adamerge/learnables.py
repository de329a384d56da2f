"""The learnables of a merged model by stable names, and their alignment with saved ones by task and group name."""

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
    return {name: each for name, each in found.items() if each.parameter.requires_grad or not _is_parameter(each)}


def _is_parameter(learned: Learned) -> bool:
    return isinstance(learned.parameter, nn.Parameter)


def labels_of(model: MergedModel) -> dict[str, list[str]]:
    """The names along each kind of axis."""
    return {"task": list(model.rule.tasks), "group": list(model.rule.groups)}


def state_of(model: MergedModel) -> dict[str, Tensor]:
    """Copies of all learnables on the CPU."""
    return {name: learned.parameter.detach().cpu().clone() for name, learned in learnables_of(model).items()}


@torch.no_grad()
def load_state(
    model: MergedModel, state: Mapping[str, Tensor], labels: Mapping[str, Sequence[str]], source: str
) -> None:
    """Copy saved learnables into the model, rows and columns matched by name.

    Raises:
        InputError: Other learnables, tasks, groups or shapes than the model's.
    """
    wanted, now = learnables_of(model), labels_of(model)
    if set(wanted) != set(state):
        missing, extra = some(sorted(set(wanted) - set(state))), some(sorted(set(state) - set(wanted)))
        raise InputError(f"{source} does not hold this merge's learnables: missing {missing}, unknown {extra}.")
    for name, (parameter, axes) in wanted.items():
        tensor = state[name]
        for axis, kind in enumerate(axes):
            if kind is not None:
                tensor = tensor.index_select(axis, _order(now[kind], labels[kind], kind, source))
        if tensor.shape != parameter.shape:
            raise InputError(
                f"{source}: '{name}' has the shape {list(tensor.shape)}, this merge needs {list(parameter.shape)}."
            )
        parameter.copy_(tensor)


def _order(now: Sequence[str], saved: Sequence[str], kind: str, source: str) -> Tensor:
    if set(now) != set(saved):
        missing, extra = some(sorted(set(now) - set(saved))), some(sorted(set(saved) - set(now)))
        raise InputError(
            f"{source} was learned for other {kind}s: it lacks {missing} and has {extra} that this merge does not."
        )
    place = {name: index for index, name in enumerate(saved)}
    return torch.tensor([place[name] for name in now])
