from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from adamerge.backbones.base import batch_size
from adamerge.loops.base import Loop
from adamerge.loops.tally import Tally, counts_of, sum_over_ranks
from adamerge.merged import MergedModel, Step
from adamerge.task_modules import TaskModule
from adamerge.types import Batch, InputError, TaskOutput

if TYPE_CHECKING:
    from adamerge.module import AdaMerge


class Joint(Loop):
    """All tasks' losses, added, in one optimiser step.

    Args:
        order: `per_task` runs forward and backward task by task, with one task's activations in memory at a time;
            `concatenated` runs all tasks as one batch; `auto` is per_task for the leaf merge and concatenated for swap.
        micro_batch: At most this many samples of a task at once; the result is the same up to rounding. Objectives that
            filter samples cost one more forward then, to know their counts first.

    Raises:
        InputError: `micro_batch` below 1.
    """

    def __init__(
        self, *, order: Literal["auto", "per_task", "concatenated"] = "auto", micro_batch: int | None = None
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise InputError(f"`loop.micro_batch` is {micro_batch}; it is a number of samples, at least 1.")
        self.order, self.micro_batch = order, micro_batch

    def problems(self, module: "AdaMerge") -> Iterator[str]:
        model = module.model
        inside = [
            m.task for m in model.modules() if isinstance(m, TaskModule) and type(m).attach is not TaskModule.attach
        ]
        if inside and (model.apply_mode == "swap" or self._concatenates(module)):
            yield (
                f"Task modules of {', '.join(inside)} work inside the network: use `apply_mode: leaf` and "
                "`loop.order: per_task` with them."
            )
        if self.micro_batch and (model.apply_mode == "swap" or self._concatenates(module)):
            yield "`loop.micro_batch` splits tasks' batches: use `apply_mode: leaf` and `loop.order: per_task` with it."
        coupled = [type(objective).__name__ for objective in module.objectives if objective.couples_batch]
        if self.micro_batch and coupled:
            yield f"{', '.join(coupled)} looks at a batch as a whole, so `loop.micro_batch` cannot split it."

    def _concatenates(self, module: "AdaMerge") -> bool:
        return self.order == "concatenated" or (self.order == "auto" and module.model.apply_mode == "swap")

    def step(self, module: "AdaMerge", batches: Mapping[str, Batch]) -> Tensor:
        tally = Tally()
        with module.model.step() as step:
            if self._concatenates(module):
                losses = []
                for out in _answers(module.model, batches):
                    terms = module.terms(out, batches[out.task])
                    losses.append(tally.loss(out.task, terms, sum_over_ranks(counts_of(terms))))
                step.backward(torch.stack(losses).sum())
            else:
                for task, batch in batches.items():
                    with module.model.attached(task):
                        self._task(module, step, tally, task, batch)
            penalties = module.penalize(step)
        return step.scalar(module.report(tally.values(), penalties))

    def _task(self, module: "AdaMerge", step: Step, tally: Tally, task: str, batch: Batch) -> None:
        size = batch_size(batch)
        width = min(self.micro_batch or size, size)
        parts = [{key: value[i : i + width] for key, value in batch.items()} for i in range(0, size, width)]
        counts = self._filtered_counts(module, task, parts) if len(parts) > 1 else None
        for part in parts:
            terms = module.terms(module.model.respond(task, part), part)
            if counts is None:
                counts = sum_over_ranks(counts_of(terms) * (size / batch_size(part)))
            step.backward(tally.loss(task, terms, counts))

    @torch.no_grad()
    def _filtered_counts(self, module: "AdaMerge", task: str, parts: Sequence[Batch]) -> Tensor | None:
        """The terms' counts over all parts and ranks where a filter decides them; None where the first part tells."""
        if not any(objective.filters for objective in module.objectives):
            return None
        passed = [counts_of(module.terms(module.model.respond(task, part), part)) for part in parts]
        return sum_over_ranks(torch.stack(passed).sum(0))


def _answers(model: MergedModel, batches: Mapping[str, Batch]) -> Iterator[TaskOutput]:
    features = model.features(model.backbone.concatenate(list(batches.values())))
    parts = features.split([batch_size(batch) for batch in batches.values()])
    for task, part in zip(batches, parts, strict=True):
        yield model.answer(task, part)
