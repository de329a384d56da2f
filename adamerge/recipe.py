"""What a merge is made from and learned with: the `model:` part of a configuration, and how it becomes a model."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.audit import header_problems
from adamerge.backbones import Backbone
from adamerge.checkpoints import State
from adamerge.loops import Joint, Loop
from adamerge.merged import ApplyMode
from adamerge.objectives import Entropy, Objective
from adamerge.opened import Opened, fill
from adamerge.recorded import Recorded
from adamerge.rules import LayerWise, MergeRule
from adamerge.space import ParamSpace
from adamerge.task_modules import TaskModule
from adamerge.task_vectors import Placement, TaskVectors
from adamerge.transforms import Transform
from adamerge.types import InputError, TaskInfo, raise_all

_BASE = "\0base"  # no task can have this name


@dataclass(frozen=True)
class SpaceOptions:
    """Which tensors are merged and what shares a coefficient.

    Args:
        group: `tensor`, `block`, `model`, or a regular expression whose first group names the group.
        skip: Regular expression of tensors that are neither merged nor compared.
        buffers: Floating buffers such as BatchNorm statistics: the base's, or the mean of the experts'.
    """

    group: str = "tensor"
    skip: str | None = None
    buffers: Literal["base", "mean"] = "base"


@dataclass(frozen=True)
class Phase:
    """A stretch of a run that trains some of the learnables; what is not given here is the recipe's.

    Args:
        train: Regular expression of the names of the learnables that are trained, from their beginning: `rule`,
            `rule.inner`, `rule.logits`, `task`; all by default.
        share: How long it lasts, in proportion to the other phases; together they last `trainer.max_steps`.
        objectives: What is minimised.
        loop: How one step goes through the tasks.
        optimizer: Makes the optimiser.
        lr_scheduler: Makes a schedule, over the steps of this phase.
    """

    train: str | None = None
    share: float = 1.0
    objectives: Sequence[Objective] | None = None
    loop: Loop | None = None
    optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None


@dataclass(frozen=True)
class VectorOptions:
    """How the task vectors are kept.

    Args:
        dtype: Their storage; by default what the checkpoints are in.
        placement: `device` moves them with the model, `cpu` leaves them in memory, `mmap` on disk in the cache folder.
        seed: Seeds transforms that draw at random; by default the run's seed.
    """

    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    placement: Placement = "device"
    seed: int | None = None


class Recipe(Recorded):
    """Everything that makes a merge but its data and its trainer.

    Args:
        base: Checkpoint of the base.
        experts: Checkpoint per task.
        backbone: Builds the network, takes its features, finds the heads.
        rule: Makes the merge rule from the task vectors.
        transforms: Applied to the task vectors in turn.
        task_modules: Made for every task; applied in turn between features and head.
        objectives: What is minimised; entropy by default.
        loop: How one step goes through the tasks.
        optimizer: Makes the optimiser of the learnables.
        lr_scheduler: Makes a schedule that advances every optimiser step.
        train: Regular expression of the names of the learnables that are trained, from their beginning; all by default.
        phases: Stretches of the run, one after the other, that train different learnables; one by default.
        init_from: Run whose learned merge, of the same sources, gives the learnables their first values.
        space: Which tensors are merged, in which groups.
        vectors: How the task vectors are kept.
        apply_mode: `leaf` or `swap`; see `MergedModel`.

    Raises:
        InputError: `train` beside `phases`, or a phase whose share is not above 0.
    """

    def __init__(
        self,
        base: str,
        experts: Mapping[str, str],
        backbone: Backbone,
        *,
        rule: Callable[[TaskVectors], MergeRule] = LayerWise,
        transforms: Sequence[Transform] = (),
        task_modules: Sequence[Callable[[TaskInfo], TaskModule]] = (),
        objectives: Sequence[Objective] | None = None,
        loop: Loop | None = None,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        train: str | None = None,
        phases: Sequence[Phase] | None = None,
        init_from: str | None = None,
        space: SpaceOptions | None = None,
        vectors: VectorOptions | None = None,
        apply_mode: ApplyMode = "leaf",
    ) -> None:
        self.base, self.experts, self.backbone, self.rule = base, dict(experts), backbone, rule
        self.transforms, self.task_modules = tuple(transforms), tuple(task_modules)
        self.objectives, self.loop = list(objectives) if objectives is not None else [Entropy()], loop or Joint()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.space, self.vectors, self.apply_mode = space or SpaceOptions(), vectors or VectorOptions(), apply_mode
        self.init_from = init_from
        if train is not None and phases:
            raise InputError("`model.train` and `model.phases` exclude each other: say in each phase what it trains.")
        wrong = [phase.share for phase in phases or () if not 0 < phase.share < math.inf]
        if wrong:
            raise InputError(f"The `share` of a phase is {wrong[0]}; it is a number above 0.")
        self.phases = [self._whole(phase) for phase in phases or [Phase(train)]]

    def _whole(self, phase: Phase) -> Phase:
        """The phase with the recipe's own where nothing else is given."""
        return replace(
            phase,
            objectives=self.objectives if phase.objectives is None else list(phase.objectives),
            loop=phase.loop or self.loop,
            optimizer=phase.optimizer or self.optimizer,
            lr_scheduler=phase.lr_scheduler or self.lr_scheduler,
        )

    def open(
        self,
        classes: Mapping[str, Sequence[str]],
        left_out: Mapping[str, str] | None = None,
        widths: Mapping[str, Any] | None = None,
    ) -> "Opened":
        """Open the sources, build the network with the base's weights and find what is merged; reads no task vectors.

        Args:
            classes: The class names of each task.
            left_out: Tensors to leave out, with the reason, beside those that `space.skip` names.
            widths: D of the `features` and of the `blocks`, where they are known from before; else `Opened.probe` finds
                them.

        Raises:
            InputError: Sources that are missing, damaged or do not fit the network or the tasks; all problems at once.
        """
        if set(classes) != set(self.experts):
            raise InputError(
                f"`model.experts` has the tasks {', '.join(self.experts)}; `data.tasks` has {', '.join(classes)}. "
                "Give every task an expert and data, under one name."
            )
        states: dict[str, State] = {}
        raise_all(self._open_states(states), "the sources")
        base = states.pop(_BASE)
        net = self.backbone.build()
        space = ParamSpace.of(net, group=self.space.group, skip=self.space.skip, buffers=self.space.buffers)
        for reason in dict.fromkeys((left_out or {}).values()):
            space = space.without([name for name, why in (left_out or {}).items() if why == reason], reason)
        raise_all(header_problems(space, base, states), "the checkpoints")
        fill(net, space, base, states)
        infos = [TaskInfo(task, tuple(classes[task]), state, base) for task, state in states.items()]
        opened = Opened(self, net, space, base, states, self.backbone.heads(infos), classes)
        if widths is not None:
            opened.width, opened.blocks = widths["features"], dict(widths["blocks"])
        return opened

    def _open_states(self, states: dict[str, State]) -> Iterator[str]:
        for name, source in [(_BASE, self.base), *self.experts.items()]:
            try:
                states[name] = self.backbone.open(source)
            except InputError as error:
                yield str(error)
