"""A step that leaves the finite numbers is undone, and remembered on the device."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from adamerge.types import NonFiniteLoss


class FiniteWatch:
    """Marks the first step at which a task's loss, or a gradient or an update, was NaN or Inf; nothing waits for it.

    Args:
        tasks: The T tasks.
        device: Where values are looked at.
        bounded: Names of learnables that cannot make a loss infinite while they are finite themselves. They stay where
            a loss was; no copy of them is held between steps.
    """

    def __init__(self, tasks: Sequence[str], device: torch.device, bounded: Collection[str] = ()) -> None:
        self._tasks, self._bounded = tuple(tasks), frozenset(bounded)
        self._first = torch.full((len(tasks) + 1,), -1, device=device, dtype=torch.int64)  # per task, then the update's
        self._good: dict[str, Tensor] = {}  # the learnables that last gave a finite loss

    def losses(self, per_task: Mapping[str, Tensor], step: int) -> None:
        """Look at losses [] of some tasks."""
        served = [task for task in self._tasks if task in per_task]
        for run in [served] if len(served) == len(self._tasks) else [[task] for task in served]:
            first = self._tasks.index(run[0])
            self._look(torch.stack([per_task[task] for task in run]), slice(first, first + len(run)), step)

    @torch.no_grad()
    def gradients(self, learnables: Mapping[str, Tensor], step: int) -> None:
        """Before an update: keep what gave finite losses, look at the gradients, let no NaN into the optimiser."""
        good = (self._first < 0).all()
        for name, learnable in learnables.items():
            if name in self._good:
                torch.where(good, learnable, self._good[name], out=self._good[name])
            else:
                self._good[name] = learnable.detach().clone()
        gradients = [learnable.grad for learnable in learnables.values() if learnable.grad is not None]
        if gradients:
            self._look(_total(gradients), slice(-1, None), step)
        for gradient in gradients:
            torch.nan_to_num_(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    @torch.no_grad()
    def updated(self, learnables: Mapping[str, Tensor], step: int) -> None:
        """Look at what an update has made; if anything was marked, go back to what last gave finite losses."""
        self._look(_total(list(learnables.values())), slice(-1, None), step)
        good = (self._first < 0).all()
        for name, learnable in learnables.items():
            learnable.copy_(torch.where(good, learnable, self._good[name]))
            if name in self._bounded:
                del self._good[name]

    def raise_if_marked(self) -> None:
        """Look at the marks; waits for the device. They are equal on all ranks: what they are of was reduced before.

        Raises:
            NonFiniteLoss: Naming the tasks and the step.
        """
        first = self._first.tolist()
        if max(first) < 0:
            return
        step = int(min(bad for bad in first if bad >= 0))
        tasks = [task for task, bad in zip(self._tasks, first, strict=False) if bad >= 0]
        what = f"The loss of {', '.join(tasks)}" if tasks else "The gradient, or the update that it gave,"
        raise NonFiniteLoss(
            f"{what} became NaN or Inf at step {step}. The merge is the last one before it whose losses were finite. "
            "Lower the learning rate, use precision 32 or bf16-mixed, or look at this task's data."
        )

    def _look(self, values: Tensor, where: slice, step: int) -> None:
        bad = ~values.isfinite() & (self._first[where] < 0)
        self._first[where] = torch.where(bad, step, self._first[where])


def _total(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all elements, [1]: not finite if one of them is not."""
    return torch.stack([tensor.detach().sum() for tensor in tensors]).sum()[None]
