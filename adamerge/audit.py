"""What can be wrong with a base and its experts: names, shapes and dtypes from the headers, values as they are read."""

import logging
import re
from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

from adamerge.checkpoints import State
from adamerge.deltas import Deltas
from adamerge.space import ParamSpace
from adamerge.types import raise_all, some

log = logging.getLogger("adamerge")


def header_problems(space: ParamSpace, base: State, experts: Mapping[str, State]) -> Iterator[str]:
    """One sentence for each checkpoint that does not fit the network; reads no tensor but tied ones."""
    if not experts:
        yield "There are no experts: name at least one under `model.experts`."
    for who, state in [("The base", base), *((f"Expert '{task}'", state) for task, state in experts.items())]:
        faults = list(_faults(space, state))
        if faults:
            yield (
                f"{who} ({state.source}) does not match the network: {'; '.join(faults)}. "
                "Check that it was fine-tuned from this base with this architecture, or narrow the merge with "
                "`model.space.skip`."
            )


def _faults(space: ParamSpace, state: State) -> Iterator[str]:
    names, expected = space.checkpoint_names(), {**space.shapes, **space.buffers}
    missing = [name for name, keys in names.items() if not any(key in state for key in keys)]
    if missing:
        yield f"missing tensors: {some(missing)}"
    known = {key for keys in names.values() for key in keys} | set(space.aliases) | set(space.left_out)
    extra = [key for key in state if key not in known and not (space.skip and re.search(space.skip, key))]
    if extra:
        yield f"tensors the network does not have: {some(extra)}"
    shapes, dtypes, ties = [], [], []
    for name, keys in names.items():
        held = [key for key in keys if key in state]
        for key in held:
            shape, dtype = state.meta(key)
            if shape != expected[name]:
                shapes.append(f"{key} is {list(shape)}, the network's {list(expected[name])}")
            if name in space.shapes and not (dtype.is_floating_point and dtype.itemsize > 1):
                dtypes.append(f"{key} is {str(dtype).removeprefix('torch.')}")
        if len(held) > 1 and not all(torch.equal(state[held[0]], state[key]) for key in held[1:]):
            ties.append(" and ".join(held))
    if shapes:
        yield f"other shapes: {some(shapes)}"
    if dtypes:
        yield f"quantised or integer tensors, which have no task vector: {some(dtypes)}"
    if ties:
        yield f"tensors that the network ties but that differ here: {some(ties)}"


class ValueAudit:
    """Watches (name, base, deltas) pass by and finds non-finite, zero and equal task vectors."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._not_finite: dict[str, list[str]] = {}
        self._changed = dict.fromkeys(tasks, False)
        self._equal = set(combinations(range(len(tasks)), 2))
        self._squares = {"": 0.0, **dict.fromkeys(tasks, 0.0)}  # of the base and of each task's vectors

    def __call__(self, name: str, base: Tensor, deltas: Deltas) -> None:
        """Look at one tensor."""
        if base.numel() == 0:
            return
        size = float(_norm(base))
        self._squares[""] += size**2
        if size - size != 0 and not bool(torch.isfinite(base).all()):
            self._not_finite.setdefault("The base", []).append(name)
            return
        vectors = deltas.dense()
        norms = [float(_norm(vector)) for vector in vectors]
        for task, norm, vector in zip(self._tasks, norms, vectors, strict=True):
            self._changed[task] |= norm != 0
            self._squares[task] += norm**2
            if norm - norm != 0 and not bool(torch.isfinite(vector).all()):
                self._not_finite.setdefault(f"Expert '{task}'", []).append(name)
        self._equal = {(i, j) for i, j in self._equal if norms[i] == norms[j] and torch.equal(vectors[i], vectors[j])}

    def finish(self) -> None:
        """After the last tensor.

        Raises:
            InputError: Everything that was found.
        """
        raise_all(self._problems(), "the checkpoints")
        far = [task for task in self._tasks if self._squares[task] > self._squares[""]]
        if far:
            log.warning(
                "Task vectors of %s are longer than the base itself: were they fine-tuned from this base?",
                ", ".join(far),
            )

    def _problems(self) -> Iterator[str]:
        for who, names in self._not_finite.items():
            yield f"{who} holds NaN or Inf in {some(names)} tensors; this checkpoint is broken, take an earlier one."
        same = [task for task, changed in self._changed.items() if not changed]
        for task in same:
            yield f"Expert '{task}' equals the base in every merged tensor; check its path, or leave the task out."
        for i, j in sorted(self._equal):
            if self._tasks[i] not in same:
                yield f"Experts '{self._tasks[i]}' and '{self._tasks[j]}' are identical; check their paths or keep one."


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor if tensor.dtype == torch.float64 else tensor.float())
