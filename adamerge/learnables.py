"""The learnables of a merged model by stable names, and their alignment with saved ones by task and group name."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adamerge.merged import MergedModel
from adamerge.types import InputError, some


class Learned(NamedTuple):
    """A trained parameter and what its axes run over."""

    parameter: nn.Parameter
    axes: tuple[str | None, ...]


def learnables_of(model: MergedModel) -> dict[str, Learned]:
    """Names that survive a reordering of the tasks: `rule.NAME` and `task.TASK.PLACE.NAME`."""
    found = {f"rule.{name}": Learned(p, model.rule.axes.get(name, ())) for name, p in model.rule.named_parameters()}
    for task in model.tasks:
        for place, module in enumerate(model.chain(task)):
            for name, parameter in module.named_parameters():
                found[f"task.{task}.{place}.{name}"] = Learned(parameter, module.axes.get(name, ()))
    return {name: learned for name, learned in found.items() if learned.parameter.requires_grad}


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
