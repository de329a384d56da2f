"""What a merge is made from and learned with: the `model:` part of a configuration, and how it becomes a model."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.audit import header_problems
from adamerge.backbones import Backbone
from adamerge.backbones.base import batch_size, to_device
from adamerge.checkpoints import State, absolute, open_state
from adamerge.loops import Joint, Loop
from adamerge.merged import ApplyMode, MergedModel
from adamerge.objectives import Entropy, Objective
from adamerge.recorded import Recorded, spec
from adamerge.rules import LayerWise, MergeRule
from adamerge.space import ParamSpace
from adamerge.task_modules import LinearHead, TaskModule, ZeroShotHead
from adamerge.task_vectors import Placement, TaskVectors
from adamerge.transforms import Transform
from adamerge.types import Batch, InputError, TaskInfo, raise_all

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
        space: Which tensors are merged, in which groups.
        vectors: How the task vectors are kept.
        apply_mode: `leaf` or `swap`; see `MergedModel`.
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
        space: SpaceOptions | None = None,
        vectors: VectorOptions | None = None,
        apply_mode: ApplyMode = "leaf",
    ) -> None:
        self.base, self.experts, self.backbone, self.rule = base, dict(experts), backbone, rule
        self.transforms, self.task_modules = tuple(transforms), tuple(task_modules)
        self.objectives, self.loop = list(objectives) if objectives is not None else [Entropy()], loop or Joint()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.space, self.vectors, self.apply_mode = space or SpaceOptions(), vectors or VectorOptions(), apply_mode

    def open(self, classes: Mapping[str, Sequence[str]], left_out: Mapping[str, str] | None = None) -> "Opened":
        """Open the sources, build the network with the base's weights and find what is merged; reads no task vectors.

        Args:
            classes: The class names of each task.
            left_out: Tensors to leave out, with the reason, beside those that `space.skip` names.

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
        _fill(net, space, base, states)
        infos = [TaskInfo(task, tuple(classes[task]), state, base) for task, state in states.items()]
        heads = self.backbone.heads(infos)
        chains = {info.name: [*(make(info) for make in self.task_modules), heads[info.name]] for info in infos}
        return Opened(self, net, space, base, states, chains, classes)

    def _open_states(self, states: dict[str, State]) -> Iterator[str]:
        for name, source in [(_BASE, self.base), *self.experts.items()]:
            try:
                states[name] = self.backbone.open(source)
            except InputError as error:
                yield str(error)


@dataclass
class Opened:
    """A recipe whose sources are open and fit together; the network stands with the base's weights."""

    recipe: Recipe
    net: nn.Module
    space: ParamSpace
    base: State
    experts: Mapping[str, State]
    chains: Mapping[str, list[TaskModule]]
    classes: Mapping[str, Sequence[str]]
    seconds: float = field(default=0.0, init=False)  # one task batch, forward and backward

    def leave_out_unreachable(self, batches: Mapping[str, Batch], device: torch.device) -> None:
        """Leave out the tensors that no task's features depend on; time a forward and backward on the way.

        Args:
            batches: One per task.
            device: Where the network goes, and stays.
        """
        self.net.to(device).eval()
        parameters = dict(self.net.named_parameters())
        for name in self.space.shapes:
            parameters[name].requires_grad_()
        try:
            for task, batch in batches.items():
                batch = to_device(batch, device)
                start = time.perf_counter()
                features = self.recipe.backbone.features(self.net, batch)
                self._check_features(task, features, batch_size(batch))
                loss = features.float().square().sum()
                loss.backward()
                loss.item()  # wait for the device
                self.seconds = time.perf_counter() - start  # the last of several: the first one warms up
            unreached = [name for name in self.space.shapes if parameters[name].grad is None]
            self.space = self.space.without(unreached, "not reached by the loss")
        finally:
            self.net.requires_grad_(False)
            for parameter in parameters.values():
                parameter.grad = None

    def _check_features(self, task: str, features: object, size: int) -> None:
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != size:
            found = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise InputError(f"The features of task '{task}' are {found}; the backbone must give a tensor [{size}, D].")
        head = self.chains[task][-1]
        width = head.weight.shape[1] if isinstance(head, (LinearHead, ZeroShotHead)) else features.shape[1]
        if features.shape[1] != width:
            raise InputError(f"Task '{task}' has features of width {features.shape[1]}, its head takes {width}.")

    @contextmanager
    def buffers_of(self, task: str | None) -> Iterator[None]:
        """An expert's own buffers (BatchNorm statistics) in the network for the length of the block; None for none."""
        names = self.space.checkpoint_names() if task is not None else {}
        held = {name: self.net.get_buffer(name).clone() for name in self.space.buffers if task is not None}
        try:
            for name in held:
                state = self.experts[str(task)]
                self.net.get_buffer(name).copy_(state[next(key for key in names[name] if key in state)])
            yield
        finally:
            for name, buffer in held.items():
                self.net.get_buffer(name).copy_(buffer)

    def load_vectors(self) -> TaskVectors:
        """Read the untransformed task vectors and check their values."""
        placement = self.recipe.vectors.placement
        return TaskVectors.load(self.space, self.base, self.experts, dtype=self._dtype, placement=placement)

    @property
    def _dtype(self) -> torch.dtype | None:
        return getattr(torch, self.recipe.vectors.dtype) if self.recipe.vectors.dtype else None

    def merged(self, raw: TaskVectors) -> MergedModel:
        """The model to train; takes the network over."""
        recipe, vectors = self.recipe, raw
        if recipe.transforms:
            options = recipe.vectors
            changed = raw.transformed(recipe.transforms, seed=options.seed or 0)
            vectors = changed.stored(dtype=self._dtype, placement=options.placement)
        return MergedModel(
            recipe.backbone, self.net, vectors, recipe.rule(vectors), self.chains, apply_mode=recipe.apply_mode
        )

    def record(self, model: MergedModel) -> dict[str, Any]:
        """What is needed to make this model again, as text, with the digests of the sources.

        Raises:
            InputError: A part that cannot be written down.
        """
        recipe = self.recipe
        modules = [spec(module) for module in self.chains[model.tasks[0]][:-1]]
        sources = {
            "base": (recipe.base, self.base),
            **{f"expert {t}": (recipe.experts[t], s) for t, s in self.experts.items()},
            **{who: (source, open_state(source)) for who, source in recipe.backbone.sources().items()},
        }
        return {
            "backbone": spec(recipe.backbone),
            "rule": spec(model.rule),
            "transforms": spec(recipe.transforms),
            "task_modules": modules,
            "space": vars(recipe.space),
            "vectors": vars(recipe.vectors),
            "left_out": {name: why for name, why in self.space.left_out.items() if why == "not reached by the loss"},
            "classes": {task: list(names) for task, names in self.classes.items()},
            "sources": {
                who: {"source": absolute(source), "sha256": state.sha256()} for who, (source, state) in sources.items()
            },
        }


@torch.no_grad()
def _fill(net: nn.Module, space: ParamSpace, base: State, experts: Mapping[str, State]) -> None:
    """Put the base's values into the network, buffers by their policy; what the base lacks and `skip` allows stays."""
    names = space.checkpoint_names()
    for name, parameter in net.named_parameters():
        key = next((key for key in names.get(name, [name]) if key in base), None)
        if key is None:
            continue
        if base[key].shape != parameter.shape:
            raise InputError(f"The base's '{key}' is {list(base[key].shape)}, the network's {list(parameter.shape)}.")
        parameter.copy_(base[key])
    for name in space.buffers:
        buffer: Tensor = net.get_buffer(name)
        held = [state[next(key for key in names[name] if key in state)] for state in (base, *experts.values())]
        mean = space.buffer_policy == "mean" and buffer.is_floating_point()
        buffer.copy_(torch.stack([tensor.float() for tensor in held[1:]]).mean(0) if mean else held[0])
        if buffer.is_floating_point() and not bool(buffer.isfinite().all()):
            raise InputError(f"The buffer '{name}' holds NaN or Inf in {'an expert' if mean else 'the base'}.")
