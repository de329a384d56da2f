"""Sources that are open and fit together, and how they become a model."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adamerge.backbones.base import batch_size, input_size, num_answers, to_device
from adamerge.blocks import recorded_blocks
from adamerge.checkpoints import State, absolute, open_state
from adamerge.hub import commit_of, hub_id
from adamerge.merged import MergedModel
from adamerge.recorded import spec
from adamerge.space import ParamSpace
from adamerge.task_modules import LinearHead, TaskModule, ZeroShotHead
from adamerge.task_vectors import TaskVectors
from adamerge.types import Batch, InputError, TaskInfo
from adamerge.vocabulary import without

if TYPE_CHECKING:
    from adamerge.recipe import Recipe

log = logging.getLogger("adamerge")


@dataclass
class Opened:
    """A recipe whose sources are open and fit together; the network stands with the base's weights."""

    recipe: "Recipe"
    net: nn.Module
    space: ParamSpace
    base: State
    experts: Mapping[str, State]
    heads: Mapping[str, TaskModule]
    classes: Mapping[str, Sequence[str]]
    excluded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # see `vocabulary.Fitted`
    width: int = field(default=0, init=False)  # D of the features; 0 until it is known
    blocks: dict[str, int] = field(default_factory=dict, init=False)  # the network's blocks, with the D of each
    seconds: float = field(default=0.0, init=False)  # one task batch, forward and backward
    activations: int = field(default=0, init=False)  # see `MergedModel`, as for `measured`
    measured: int = field(default=0, init=False)

    def probe(self, batches: Mapping[str, Batch], device: torch.device) -> None:
        """Run every task once: leave out the tensors that no features depend on, measure widths, time and memory.

        Args:
            batches: One per task.
            device: Where the network goes, and stays.
        """
        self.net.to(device).eval()
        parameters = dict(self.net.named_parameters())
        for name in self.space.shapes:
            parameters[name].requires_grad_()
        kept, seen = [], []
        try:
            for task, batch in batches.items():
                batch = to_device(batch, device)
                start = time.perf_counter()
                with kept_bytes(self.net) as counted:
                    features = self._look_at(task, batch)
                kept.append((counted(), input_size(batch)))
                seen.append((batch, features.detach()))
                loss = features.float().square().sum()
                loss.backward()
                loss.item()  # wait for the device
                self.seconds = time.perf_counter() - start  # the last of several: the first one warms up
            if self._joins(seen):
                self.activations, self.measured = max(kept)
            unreached = [name for name in self.space.shapes if parameters[name].grad is None]
            self.space = self.space.without(unreached, "not reached by the loss")
        finally:
            self.net.requires_grad_(False)
            for parameter in parameters.values():
                parameter.grad = None

    def _joins(self, seen: Sequence[tuple[Batch, Tensor]]) -> bool:
        """The tasks' batches can be made one, and two of them are answered as each for itself."""
        backbone, apart = self.recipe.backbone, torch.cat([features for _, features in seen[:2]])
        try:
            backbone.concatenate([batch for batch, _ in seen])
            with torch.no_grad():
                together = backbone.features(self.net, backbone.concatenate([batch for batch, _ in seen[:2]]))
            return bool((together - apart).norm() <= 0.02 * apart.norm())  # bf16 rounds by less
        except Exception as error:  # a backbone of the user's own may raise what it likes
            log.debug("The tasks' batches stay apart: %s", error)
            return False

    def _look_at(self, task: str, batch: Batch) -> Tensor:
        """A task's features [B, D], checked, with the widths that were seen on the way."""
        names, size = self.recipe.backbone.blocks(self.net), batch_size(batch)
        with recorded_blocks(self.net, names, size) as found:
            features = self.recipe.backbone.features(self.net, batch)
        self._check_features(task, features, num_answers(batch))
        fit = len(found) == len(names) and all(block.dim() == 2 and len(block) == size for block in found)
        self.blocks = {name: block.shape[1] for name, block in zip(names, found, strict=True)} if fit else {}
        self.width = features.shape[1]
        return features

    def _check_features(self, task: str, features: object, size: int) -> None:
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != size:
            found = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise InputError(f"The features of task '{task}' are {found}; the backbone must give a tensor [{size}, D].")
        head = self.heads[task]
        width = head.weight.shape[1] if isinstance(head, (LinearHead, ZeroShotHead)) else features.shape[1]
        if features.shape[1] != width:
            raise InputError(f"Task '{task}' has features of width {features.shape[1]}, its head takes {width}.")

    @contextmanager
    def buffers_of(self, task: str | None) -> Iterator[None]:
        """An expert's own buffers (BatchNorm statistics) in the network for the length of the block; None for none."""
        state: Mapping[str, Tensor] = self.experts[task] if task is not None else {}
        keys = {name: next((k for k in self.space.names_of(name) if k in state), None) for name in _lasting(self.net)}
        held = {name: self.net.get_buffer(name).clone() for name, key in keys.items() if key is not None}
        try:
            for name in held:
                self.net.get_buffer(name).copy_(state[str(keys[name])])
            yield
        finally:
            for name, buffer in held.items():
                self.net.get_buffer(name).copy_(buffer)

    def load_vectors(self) -> TaskVectors:
        """Read the untransformed task vectors and check their values."""
        options = self.recipe.vectors
        return TaskVectors.load(
            *(self.space, self.base, self._merged_experts),
            dtype=self._dtype,
            placement=options.placement,
            ancestry=options.ancestry,
        )

    def vectors(self) -> TaskVectors:
        """The untransformed task vectors, read whenever asked for."""
        return TaskVectors.open(self.space, self.base, self._merged_experts)

    @property
    def _merged_experts(self) -> dict[str, State]:
        """The experts with the base's values where they are left out of the merge."""
        return {task: without(state, self.base, self.excluded.get(task, {})) for task, state in self.experts.items()}

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
        chains = {task: self._chain(task) for task in self.experts}
        model = MergedModel(
            recipe.backbone, self.net, vectors, recipe.rule(vectors), chains, apply_mode=recipe.apply_mode
        )
        model.activations, model.measured = self.activations, self.measured
        return model

    def _chain(self, task: str) -> list[TaskModule]:
        head, seed = self.heads[task], self.recipe.vectors.seed or 0
        info = TaskInfo(
            task, tuple(self.classes[task]), self.experts[task], self.base, head, self.net, self.width or None,
            self.blocks, seed,
        )  # fmt: skip
        return [*(make(info) for make in self.recipe.task_modules), head]

    def record(self, model: MergedModel) -> dict[str, Any]:
        """What is needed to make this model again, as text, with the digests of the sources.

        Raises:
            InputError: A part that cannot be written down.
        """
        recipe = self.recipe
        modules = [spec(module) for module in model.chain(model.tasks[0])[:-1]]
        sources = {
            "base": (recipe.base, self.base),
            **{f"expert {t}": (recipe.experts[t], s) for t, s in self.experts.items()},
            **{who: (source, open_state(source)) for who, source in recipe.backbone.sources().items()},
        }
        return {
            "backbone": _lasting_model(spec(recipe.backbone), absolute(recipe.base)),
            "rule": spec(model.rule),
            "transforms": spec(recipe.transforms),
            "task_modules": modules,
            "space": vars(recipe.space),
            "vectors": vars(recipe.vectors),
            "left_out": {name: why for name, why in self.space.left_out.items() if why == "not reached by the loss"},
            "widths": {"features": self.width, "blocks": dict(self.blocks)},
            "folds": not modules,
            "classes": {task: list(names) for task, names in self.classes.items()},
            "sources": {
                who: {
                    "source": absolute(source),
                    **({"revision": state.revision} if state.revision else {}),
                    "sha256": state.sha256(),
                }
                for who, (source, state) in sources.items()
            },
        }


@contextmanager
def kept_bytes(net: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts what a forward inside the block keeps for its backward, beside the network's own tensors, in bytes.

    Nor do copies of weights in another dtype count, which autocast makes once for a batch, however large.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    dtypes = {weight.dtype for weight in net.parameters()}
    uncopied = Counter(tuple(sorted(weight.shape)) for weight in net.parameters())  # a linear layer keeps a transpose
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage, shape = tensor.untyped_storage(), tuple(sorted(tensor.shape))
            place = storage.data_ptr()
            if place not in own and tensor.dtype not in dtypes and uncopied[shape] > 0:
                uncopied[shape] -= 1  # a batch's tensor of that shape counts when the copy itself comes
                own.add(place)
            elif place not in own:
                found[place] = storage.nbytes()
        return tensor.detach()  # a node that held its own output, with its history, would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(found.values())


def _lasting_model(backbone: dict[str, Any], base: str) -> dict[str, Any]:
    """A backbone's text form whose `model`, where it is another one of the hub than the base, has its commit."""
    options = backbone["init_args"]
    model = options.get("model")
    if not isinstance(model, str) or model == base or hub_id(model) is None:
        return backbone
    return {**backbone, "init_args": {**options, "model": f"{model.partition('@')[0]}@{commit_of(model)}"}}


def _lasting(net: nn.Module) -> list[str]:
    """The names of the network's buffers that checkpoints hold."""
    state = net.state_dict()
    return [name for name, _ in net.named_buffers() if name in state]


@torch.no_grad()
def fill(net: nn.Module, space: ParamSpace, base: State, experts: Mapping[str, State]) -> None:
    """Put the base's values into the network, buffers by their policy; what the base lacks and `skip` allows stays."""
    names = space.checkpoint_names()
    skipped = [(name, net.get_buffer(name)) for name in _lasting(net) if name not in space.buffers]
    for name, tensor in [*net.named_parameters(), *skipped]:
        key = next((key for key in space.names_of(name) if key in base), None)
        if key is None:
            continue
        if base[key].shape != tensor.shape:
            raise InputError(f"The base's '{key}' is {list(base[key].shape)}, the network's {list(tensor.shape)}.")
        tensor.copy_(base[key])
    for name in space.buffers:
        buffer: Tensor = net.get_buffer(name)
        held = [state[next(key for key in names[name] if key in state)] for state in (base, *experts.values())]
        mean = space.buffer_policy == "mean" and buffer.is_floating_point()
        buffer.copy_(torch.stack([tensor.float() for tensor in held[1:]]).mean(0) if mean else held[0])
        if buffer.is_floating_point() and not bool(buffer.isfinite().all()):
            raise InputError(f"The buffer '{name}' holds NaN or Inf in {'an expert' if mean else 'the base'}.")
