from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from adamerge.backbones.base import batch_size, input_shapes
from adamerge.learnables import trained_names
from adamerge.loops.base import Loop
from adamerge.loops.min_norm import gram, min_norm_weights
from adamerge.loops.tally import Tally, counts_of
from adamerge.ranks import sum_over_ranks, world_size
from adamerge.step import Step
from adamerge.types import ROWS, Batch, InputError, some

if TYPE_CHECKING:
    from adamerge.module import AdaMerge


class Joint(Loop):
    """All tasks' losses, added, in one optimiser step.

    Args:
        order: `per_task` runs forward and backward task by task, with one task's activations in memory at a time;
            `concatenated` runs all tasks as one batch; `auto` runs neighbouring tasks whose inputs are of one shape
            as one batch as long as they keep little for their backward (an eighth of a GPU's memory, 1 GB elsewhere),
            where that was measured, and goes task by task where it was not; with the swap merge, all are one batch.
        micro_batch: At most this many samples of a task at once; the result is the same up to rounding. Objectives that
            filter samples cost one more forward then, to know their counts first.
        combine: How the tasks' gradients of the rule become one: their `sum`, or the shortest vector in their convex
            hull, `min_norm`, along which no task's loss rises at first order. That costs one contraction with the task
            vectors and one gradient of the learnables for each task. Gradients of task modules are added in both.

    Raises:
        InputError: `micro_batch` below 1.

    Source: `min_norm` is MGDA, arXiv 1810.04650.
    """

    def __init__(
        self,
        *,
        order: Literal["auto", "per_task", "concatenated"] = "auto",
        micro_batch: int | None = None,
        combine: Literal["sum", "min_norm"] = "sum",
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise InputError(f"`loop.micro_batch` is {micro_batch}; it is a number of samples, at least 1.")
        self.order, self.micro_batch, self.combine = order, micro_batch, combine

    def problems(self, module: "AdaMerge") -> Iterator[str]:
        model = module.model
        split = model.apply_mode == "leaf" and not self._concatenates(module)
        wrong = [] if model.apply_mode == "leaf" else ["`apply_mode: leaf`"]
        wrong += ["`loop.order: per_task`"] if self.order == "concatenated" else []
        advice = f"use {' and '.join(wrong)}"
        inside = sorted({type(part).__name__ for task in model.tasks for part in model.chain(task) if part.inside})
        if inside and not split:
            yield f"{', '.join(inside)} works inside the network, for one task at a time: {advice} with it."
        if module.block_names and not split:
            yield f"Objectives on blocks look at one task at a time: {advice} with them."
        if self.micro_batch and not split:
            yield f"`loop.micro_batch` splits tasks' batches: {advice} with it."
        if self.combine == "min_norm" and not split:
            yield f"`loop.combine: min_norm` needs each task's own gradient: {advice} with it."
        if self.combine == "min_norm" and model.is_fixed:
            yield "`loop.combine: min_norm` combines gradients of the rule, but no learnable of the rule is trained."
        coupled = [type(objective).__name__ for objective in module.objectives if objective.couples_batch]
        if self.micro_batch and coupled:
            yield f"{', '.join(coupled)} looks at a batch as a whole, so `loop.micro_batch` cannot split it."

    def _concatenates(self, module: "AdaMerge") -> bool:
        return self.order == "concatenated" or (self.order == "auto" and module.model.apply_mode == "swap")

    def _groups(self, module: "AdaMerge", batches: Mapping[str, Batch]) -> list[list[str]]:
        """The tasks that run as one batch, in order, so that ranks reduce the same counts whatever their groups."""
        if self._concatenates(module):
            return [list(batches)]
        room, groups, held, last = self._room(module), list[list[str]](), 0.0, None
        for task, batch in batches.items():
            shapes, kept = input_shapes(batch), module.model.activations_of(batch)
            if groups and shapes == last and 0 < held + kept <= room:
                groups[-1].append(task)
                held += kept
            else:
                groups.append([task])
                held, last = kept, shapes
        return groups

    def _room(self, module: "AdaMerge") -> int:
        """Bytes that the tasks of one batch may keep for their backward; 0: each is a batch of its own."""
        model = module.model
        inside = any(part.inside for task in model.tasks for part in model.chain(task))
        alone = inside or module.block_names or self.micro_batch or self.combine == "min_norm"
        if self.order == "per_task" or not model.activations or alone:
            return 0
        if model.device.type == "cuda":
            return torch.cuda.get_device_properties(model.device).total_memory // 8
        return 1 << 30  # on CPUs, larger batches run slower, not faster: see docs/performance.md

    def step(self, module: "AdaMerge", batches: Mapping[str, Batch]) -> Tensor:
        tally, apart = Tally(), []
        with module.step(batches) as step:
            for _ in self.passes(module, step, tally, batches):
                if self.combine == "min_norm":
                    apart.append(step.taken())
            penalties = module.penalize(step)
        check_reached(step, module, batches)
        if apart:
            for name, gradient in _combined(apart).items():
                step.gradients[name] += gradient
        return step.scalar(module.report(tally.values(), penalties))

    def passes(self, module: "AdaMerge", step: Step, tally: Tally, batches: Mapping[str, Batch]) -> Iterator[None]:
        """Send the tasks' losses backward, stopping after every task, or once where all are one batch."""
        for tasks in self._groups(module, batches):
            if len(tasks) == 1 and not self._concatenates(module):
                with module.model.attached(tasks[0]):
                    self._task(module, step, tally, tasks[0], batches[tasks[0]])
            else:
                losses = []
                for out in module.respond_to_all({task: batches[task] for task in tasks}):
                    terms = module.terms(out, batches[out.task])
                    losses.append(tally.loss(out.task, terms, sum_over_ranks(counts_of(terms))))
                step.backward(torch.stack(losses).sum())
            yield

    def _task(self, module: "AdaMerge", step: Step, tally: Tally, task: str, batch: Batch) -> None:
        size = batch_size(batch)
        width = min(self.micro_batch or size, size)
        whole = width == size
        parts = [batch] if whole else [part_of(batch, slice(start, start + width)) for start in range(0, size, width)]
        counts = self._filtered_counts(module, task, parts) if len(parts) > 1 else None
        for part in parts:
            terms = module.terms(module.respond(task, part), part)
            if counts is None:
                counts = sum_over_ranks(counts_of(terms) * (size / batch_size(part)))
            step.backward(tally.loss(task, terms, counts))

    @torch.no_grad()
    def _filtered_counts(self, module: "AdaMerge", task: str, parts: Sequence[Batch]) -> Tensor | None:
        """The terms' counts over all parts and ranks where a filter decides them; None where the first part tells."""
        if not any(objective.filters for objective in module.objectives):
            return None
        passed = [counts_of(module.terms(module.respond(task, part), part)) for part in parts]
        return sum_over_ranks(torch.stack(passed).sum(0))


def check_reached(step: Step, module: "AdaMerge", batches: Mapping[str, Batch]) -> None:
    """Refuse a step of all tasks whose losses depend on nothing that is trained."""
    if not step.reached and len(batches) == len(module.served_tasks):
        objectives = " + ".join(type(objective).__name__ for objective in module.objectives)
        raise InputError(
            f"No loss depends on what is trained: {objectives} says nothing of {some(trained_names(module.model))}. "
            "Choose another objective, or other learnables in `train`."
        )


def part_of(batch: Batch, part: slice) -> Batch:
    """Some samples of a batch; entries may be tensors, lists of tensors, or lists with one item for each sample.

    Raises:
        InputError: It is answered otherwise than once for each sample.
    """
    if ROWS in batch:
        raise InputError(
            "A batch that has several answers for a sample cannot be split: leave `loop.micro_batch` out, take another "
            "loop, or lower `data.batch_size`."
        )

    def of(value: Any) -> Any:
        return [item[part] for item in value] if isinstance(value, list) and torch.is_tensor(value[0]) else value[part]

    return {key: of(value) for key, value in batch.items()}


def _combined(apart: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The min-norm combination of the tasks' gradients of the rule, equal on all ranks; the sum of all others.

    The gradients are taken over, one after the other.
    """
    shared = [name for name in apart[0] if name.startswith("rule.")]
    for gradients in apart:
        for name in shared:
            sum_over_ranks(gradients[name]).div_(world_size())
    weights = min_norm_weights(gram([[gradients[name] for name in shared] for gradients in apart])).unbind()
    for weight, gradients in zip(weights, apart, strict=True):
        for name in shared:
            gradients[name] *= weight
    total = apart[0]
    for gradients in apart[1:]:
        for name in total:
            total[name] += gradients.pop(name)
    return total
