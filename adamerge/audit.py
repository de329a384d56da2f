"""What can be wrong with a base and its experts: names, shapes and dtypes from the headers, values as they are read."""

import logging
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from adamerge.checkpoints import State
from adamerge.deltas import Deltas
from adamerge.space import ParamSpace
from adamerge.types import InputError, raise_all, some

log = logging.getLogger("adamerge")

_SAMPLE, _ENOUGH = 4096, 2000  # weights of one tensor whose signs are compared; of all, to tell chance from descent


def header_problems(
    space: ParamSpace, base: State, experts: Mapping[str, State], *, values: bool = True
) -> Iterator[str]:
    """One sentence for each checkpoint that does not fit the network; reads tied tensors, if any `values`."""
    if not experts:
        yield "There are no experts: name at least one under `model.experts`."
    for who, state in [("The base", base), *((f"Expert '{task}'", state) for task, state in experts.items())]:
        try:
            faults = list(_faults(space, state, values))
        except InputError as error:  # a type that is not read
            yield str(error)
            continue
        if faults:
            yield (
                f"{who} ({state.source}) does not match the network: {'; '.join(faults)}. "
                "Check that it was fine-tuned from this base with this architecture, or narrow the merge with "
                "`model.space.skip`."
            )


def _faults(space: ParamSpace, state: State, values: bool) -> Iterator[str]:
    names, expected = space.checkpoint_names(), {**space.shapes, **space.buffers}
    missing = [name for name, keys in names.items() if not any(key in state for key in keys)]
    if missing:
        yield f"missing tensors: {some(missing)}"
    known = {key for keys in names.values() for key in keys} | set(space.aliases) | set(space.left_out)
    is_skipped = space.skipper()
    extra = [key for key in state if key not in known and not is_skipped(key)]
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
        if values and len(held) > 1 and not all(torch.equal(state[held[0]], state[key]) for key in held[1:]):
            ties.append(" and ".join(held))
    if shapes:
        yield f"other shapes: {some(shapes)}"
    if dtypes:
        yield f"quantised or integer tensors, which have no task vector: {some(dtypes)}"
    if ties:
        yield f"tensors that the network ties but that differ here: {some(ties)}"


class ValueAudit:
    """Watches (name, base, deltas) pass by and finds non-finite, zero, equal and unrelated task vectors.

    Args:
        tasks: The T names.
        ancestry: Whether an expert that does not descend from the base is an error or a warning: one whose vector is
            longer than the base itself, and whose weights have the base's signs no more often than by chance.
    """

    def __init__(self, tasks: tuple[str, ...], ancestry: Literal["error", "warn"] = "error") -> None:
        self._tasks, self._ancestry = tasks, ancestry
        self._signs = torch.zeros(len(tasks), dtype=torch.float64)  # how many of the sampled weights kept theirs
        self._lengths = torch.zeros(len(tasks) + 1, dtype=torch.float64)  # squared; the base's is last
        self._sampled = 0
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
        self._sample(base, vectors)
        self._equal = {(i, j) for i, j in self._equal if norms[i] == norms[j] and torch.equal(vectors[i], vectors[j])}

    def _sample(self, base: Tensor, vectors: Tensor) -> None:
        """Count signs and lengths of some weights."""
        if base.dim() < 2:  # scales of norms are positive everywhere
            return
        step = max(1, base.numel() // _SAMPLE)
        sample_N = base.flatten()[::step].float()
        moved_TN = vectors.flatten(1)[:, ::step].float()
        self._signs += ((sample_N + moved_TN).sign() == sample_N.sign()).sum(1).double().cpu()
        self._lengths += torch.cat([moved_TN, sample_N[None]]).double().square().sum(1).cpu()
        self._sampled += len(sample_N)

    def _strangers(self) -> Iterator[str]:
        shares, ratios = self._signs / max(1, self._sampled), (self._lengths[:-1] / self._lengths[-1]).sqrt()
        for task, kept, ratio in zip(self._tasks, shares.tolist(), ratios.tolist(), strict=True):
            if self._sampled >= _ENOUGH and ratio > 1 and kept < 0.6:
                yield (
                    f"Expert '{task}' does not descend from this base: its task vector is {ratio:.1f} times as long as "
                    f"the base, and {100 * kept:.0f} % of its weights have the base's sign, as by chance. Name the "
                    "base that it was fine-tuned from, or set `model.vectors.ancestry` to `warn`."
                )

    def finish(self) -> None:
        """After the last tensor.

        Raises:
            InputError: Everything that was found.
        """
        strangers = list(self._strangers())
        raise_all([*self._problems(), *(strangers if self._ancestry == "error" else ())], "the checkpoints")
        for told in strangers:
            log.warning("%s", told)
        far = [task for task in self._tasks if not strangers and self._squares[task] > self._squares[""]]
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
