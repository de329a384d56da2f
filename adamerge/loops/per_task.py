from collections.abc import Sequence
from typing import Literal

import torch

from adamerge.loops.joint import Joint
from adamerge.seeding import seed_of
from adamerge.types import InputError


class PerTask(Joint):
    """One task's loss in each optimiser step, the tasks in turn; `trainer.max_steps` counts these steps.

    A round takes one batch of every task. Task modules of tasks that a step does not serve stay as they are, moments of
    the optimiser included.

    Args:
        task_order: The tasks' order in a round: `fixed`, as they are given, or `shuffled`, drawn for each round.
        steps_per_batch: Optimiser steps on one batch before the next.
        micro_batch: As for `Joint`.

    Raises:
        InputError: `steps_per_batch` or `micro_batch` below 1.
    """

    def __init__(
        self,
        *,
        task_order: Literal["fixed", "shuffled"] = "fixed",
        steps_per_batch: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(order="per_task", micro_batch=micro_batch)
        if steps_per_batch < 1:
            raise InputError(f"`loop.steps_per_batch` is {steps_per_batch}; it is at least 1.")
        self._task_order, self._steps_per_batch = task_order, steps_per_batch

    def slot(self, step: int, tasks: Sequence[str], seed: int) -> tuple[int, Sequence[str]]:
        number, place = divmod(step // self._steps_per_batch, len(tasks))
        if self._task_order == "shuffled":
            generator = torch.Generator().manual_seed(seed_of(seed, "task order", number))
            place = int(torch.randperm(len(tasks), generator=generator)[place])
        return number, (tasks[place],)
