"""What a merge is made from and learned with: the `model:` part of a configuration, and how it becomes a model."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.audit import header_problems
from adamerge.backbones import Backbone
from adamerge.checkpoints import State, open_state
from adamerge.loops import Joint, Loop
from adamerge.merged import ApplyMode
from adamerge.naming import check_task_names
from adamerge.objectives import Entropy, Objective
from adamerge.opened import Opened, fill
from adamerge.recorded import Recorded
from adamerge.rules import LayerWise, MergeRule
from adamerge.space import ParamSpace
from adamerge.task_modules import TaskModule
from adamerge.task_vectors import Placement, TaskVectors
from adamerge.transforms import Transform
from adamerge.types import InputError, TaskInfo, raise_all
from adamerge.vocabulary import fit_vocabularies

_BASE = "\0base"  # no task can have this name


@dataclass(frozen=True)
class SpaceOptions:
    """Which tensors are merged and what shares a coefficient.

    Args:
        group: `tensor`, `block`, `model`, or a regular expression whose first group names the group.
        skip: Regular expression of tensors that are neither merged nor compared.
        buffers: Floating buffers such as BatchNorm statistics: the base's, or the mean of the experts'.
        vocabulary: What to do with an expert whose tokens are not the base's: `error`; `base` keeps the base's token
            embeddings unmerged, for all; `exclude` leaves that expert out of the merge of them.
    """

    group: str = "tensor"
    skip: str | None = None
    buffers: Literal["base", "mean"] = "base"
    vocabulary: Literal["error", "base", "exclude"] = "error"


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
    """Storage of the task vectors.

    Args:
        dtype: Their storage; by default what the checkpoints are in.
        placement: `device` moves them with the model, `cpu` leaves them in memory, `mmap` on disk in the cache folder.
        seed: Seeds transforms that draw at random; by default the run's seed.
        ancestry: An expert that does not descend from the base, by length and signs of its vector, is an `error`, or
            only worth a warning (`warn`).
    """

    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    placement: Placement = "device"
    seed: int | None = None
    ancestry: Literal["error", "warn"] = "error"


@dataclass
class Survey:
    """The facts about a recipe's sources that are known before their values are read.

    Attributes:
        problems: All that is wrong with them.
        classes: The class names of each expert's task.
        net: The network, perhaps without values; with what follows, only there where the base could be opened.
        space: What is merged.
        base: The base's checkpoint.
        experts: The experts'.
        excluded: What some experts are left out of the merge of; see `vocabulary.Fitted`.
    """

    problems: list[str]
    classes: Mapping[str, Sequence[str]]
    net: nn.Module = field(default_factory=nn.Identity)
    space: ParamSpace = field(default_factory=lambda: ParamSpace({}, {}, (), {}, {}))
    base: State = field(default_factory=lambda: open_state({}))
    experts: Mapping[str, State] = field(default_factory=dict)
    excluded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


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
        optimizer: Makes the optimiser of the learnables; by default Adam (`module.adam`).
        lr_scheduler: Makes a schedule that advances every optimiser step.
        train: Regular expression of the names of the learnables that are trained, from their beginning; all by default.
        phases: Stretches of the run, one after the other, that train different learnables; one by default.
        init_from: Run whose learned merge, of the same sources, gives the learnables their first values.
        space: Which tensors are merged, in which groups.
        vectors: Storage of the task vectors.
        apply_mode: `leaf` or `swap`; see `MergedModel`.

    Raises:
        InputError: A task's name that is none, `train` beside `phases`, or a phase whose share is not above 0.
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
        check_task_names(experts, "`model.experts`")
        self.base, self.experts, self.backbone, self.rule = base, dict(experts), backbone, rule
        self.backbone.bind(base)
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
        survey = self._survey(classes, left_out or {}, self.backbone.open, self.backbone.build, values=True)
        raise_all(survey.problems, "the sources")
        net, space, base, states = survey.net, survey.space, survey.base, survey.experts
        fill(net, space, base, states)
        infos = [TaskInfo(task, tuple(survey.classes[task]), state, base) for task, state in states.items()]
        heads = self.backbone.heads(infos)
        opened = Opened(self, net, space, base, states, heads, survey.classes, survey.excluded)
        if widths is not None:
            opened.width, opened.blocks = widths["features"], dict(widths["blocks"])
        return opened

    def survey(self, classes: Mapping[str, Sequence[str]]) -> "Survey":
        """Survey the sources by configurations and headers alone: nothing else is read or fetched.

        Args:
            classes: The class names of each task, as far as they are known.
        """
        return self._survey(classes, {}, self.backbone.peek, self.backbone.outline)

    def _survey(
        self,
        classes: Mapping[str, Sequence[str]],
        left_out: Mapping[str, str],
        look: Callable[[str], State],
        build: Callable[[], nn.Module],
        *,
        values: bool = False,
    ) -> "Survey":
        states: dict[str, State] = {}
        known: dict[str, Sequence[str]] = {}
        problems = list(self._problems(classes, states, known, look))
        base = states.pop(_BASE, None)
        if base is None:
            return Survey(list(dict.fromkeys(problems)), known)
        try:
            net = build()
            space = ParamSpace.of(net, group=self.space.group, skip=self.space.skip, buffers=self.space.buffers)
            space = space.apart({**self.backbone.own(base), **self._spared(space, base, states), **left_out})
            fitted = fit_vocabularies(self, net, space, base, states)
        except InputError as error:
            return Survey([*problems, str(error)], known)
        lost = set(self.experts) - set(states)  # said already
        space, states = fitted.space, fitted.experts
        found = header_problems(space, base, states, values=values) if states or not lost else ()
        return Survey([*problems, *fitted.problems, *found], known, net, space, base, states, fitted.excluded)

    def _spared(self, space: ParamSpace, base: State, experts: Mapping[str, State]) -> dict[str, str]:
        """Return the tensors that no expert has and that the backbone leaves as they are in the base."""
        lacking = [name for name in space.shapes if not any(name in state for state in experts.values())]
        return {n: "the base's, in no expert" for n in lacking if n in base and self.backbone.spare(n)}

    def _problems(
        self,
        classes: Mapping[str, Sequence[str]],
        states: dict[str, State],
        known: dict[str, Sequence[str]],
        look: Callable[[str], State],
    ) -> Iterator[str]:
        """Yield the problems that show before the network is made; open the sources and find class names on the way."""
        strange = sorted(set(classes) - set(self.experts))
        if strange:
            yield (
                f"`data.tasks` has {', '.join(strange)}, which `model.experts` has not; it has "
                f"{', '.join(self.experts)}. Give every task an expert, under the same name."
            )
        for name, source in [(_BASE, self.base), *self.experts.items()]:
            try:
                if name != _BASE:
                    yield from (f"Expert '{name}': {problem}" for problem in self.backbone.differences(source))
                    known[name] = self.backbone.classes(source, classes.get(name, ()))
                states[name] = look(source)
            except InputError as error:
                yield str(error)
