"""The merged model: weights made by a rule, run inside a network that holds none of its own."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from adamerge.backbones import Backbone
from adamerge.backbones.base import input_size
from adamerge.modules import FrozenStore, parameter_sites, put, swapped
from adamerge.multitask import Chains, MultiTaskModel
from adamerge.rules import MergeRule
from adamerge.step import Step, leaf_of, pull_back
from adamerge.task_vectors import TaskVectors
from adamerge.types import Batch, InputError

ApplyMode = Literal["leaf", "swap"]


class _Skeleton(FrozenStore):
    """A network whose merged tensors are absent and whose others are frozen. Follows `.to()` by device and dtype."""

    net: nn.Module

    def __init__(self, net: nn.Module, merged: Sequence[str]) -> None:
        super().__init__()
        sites = parameter_sites(net)
        self.sites = {name: sites[name] for name in merged}
        self.dtypes = {name: places[0][0]._parameters[places[0][1]].dtype for name, places in self.sites.items()}  # type: ignore[union-attr]
        for places in self.sites.values():
            for module, attribute in places:
                put(module, attribute, None)
        self.in_place = False
        object.__setattr__(
            self, "net", net.requires_grad_(False).eval()
        )  # not a submodule: invisible to DDP and checkpoints

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtypes = {
            name: fn(torch.empty(0, dtype=dtype, device=self.device)).dtype for name, dtype in self.dtypes.items()
        }
        self.net._apply(fn, recurse)
        return super()._apply(fn, recurse)


class MergedModel(MultiTaskModel):
    """A rule, task vectors and a network, run with the merged weights in place.

    Args:
        backbone: How to take features and heads.
        net: The network with its unmerged tensors in place. It is taken over: its merged parameters are removed, and
            stand in it only inside `applied()` and `step()`.
        vectors: Base and task vectors.
        rule: Makes the weights.
        chains: Per task, the modules from features to logits.
        apply_mode: `leaf`: the weights enter the network as detached leaves, one pull-back per step contracts their
            gradients with the task vectors; any number of backwards. `swap`: the weights enter with their graph, one
            backward per step.

    Attributes:
        activations: Bytes that a batch of one task keeps for its backward, where that was measured and the tasks'
            batches can be joined; else 0.
        measured: Numbers in that batch; 0 where all batches are alike.
    """

    activations = 0
    measured = 0

    def __init__(
        self,
        backbone: Backbone,
        net: nn.Module,
        vectors: TaskVectors,
        rule: MergeRule,
        chains: Chains,
        *,
        apply_mode: ApplyMode = "leaf",
    ) -> None:
        if set(vectors.tasks) != set(chains):
            raise InputError(f"Task vectors are of {', '.join(vectors.tasks)}; task modules of {', '.join(chains)}.")
        skeleton = net if isinstance(net, _Skeleton) else _Skeleton(net, tuple(vectors.space.shapes))
        super().__init__(backbone, skeleton, chains)
        self.vectors, self.rule, self.apply_mode = vectors, rule, apply_mode
        self._trainable = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        self._places = parameter_sites(self)  # once, not in every step
        self._held: dict[str, Tensor] | None = None

    def variant(self, rule: MergeRule, vectors: TaskVectors | None = None) -> "MergedModel":
        """The same network, heads and device under another rule, and other vectors of the same space."""
        chains = {task: self.chain(task)[-1:] for task in self.tasks}
        model = MergedModel(
            self.backbone, self._skeleton, vectors or self.vectors, rule, chains, apply_mode=self.apply_mode
        )
        for part in (model.rule, model.vectors):
            part.to(self._skeleton.device)
        return model

    def learnables(self) -> dict[str, nn.Parameter]:
        """What is trained now: the rule's and the task modules' parameters that require grad."""
        return {name: parameter for name, parameter in self._trainable.items() if parameter.requires_grad}

    def trainable(self) -> dict[str, nn.Parameter]:
        """All that could be trained when the model was made, whether or not it is trained now."""
        return dict(self._trainable)

    def activations_of(self, batch: Batch) -> float:
        """Bytes that a batch keeps for its backward, in proportion to its size."""
        return self.activations * (input_size(batch) / self.measured if self.measured else 1.0)

    @property
    def is_fixed(self) -> bool:
        """Nothing of the rule is trained now, so that the merged weights stay as they are."""
        return not any(parameter.requires_grad for parameter in self.rule.parameters())

    @property
    def is_held(self) -> bool:
        """Inside of `hold()`."""
        return self._held is not None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Merge once for the length of the block, in which no learnable of the rule may change."""
        with torch.no_grad():
            self._held = self._weights(self.rule.begin())
        try:
            yield
        finally:
            self._held = None

    def weights(self) -> dict[str, Tensor]:
        """Merged tensors by canonical name, in the model's device and dtype, differentiable in the learnables."""
        return self._weights(self.rule.begin()) if self._held is None else self._held

    def _weights(self, shared: Any) -> dict[str, Tensor]:
        return {name: self._make(name, shared) for name in self.vectors.space.shapes}

    def _make(self, name: str, shared: Any, dtype: torch.dtype | None = None) -> Tensor:
        skeleton = self._skeleton
        with torch.autocast(skeleton.device.type, enabled=False):
            merged = self.rule.merge(name, self.vectors.base(name), self.vectors.deltas(name), shared)
            return merged.to(skeleton.device, dtype or skeleton.dtypes[name])

    @property
    def _skeleton(self) -> _Skeleton:
        assert isinstance(self.net, _Skeleton)
        return self.net

    def bare_net(self) -> nn.Module:
        if not self._skeleton.in_place:
            raise RuntimeError(
                "The merged weights are not in place: call the model itself, or work inside `applied()` or `step()`."
            )
        return self._skeleton.net

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._skeleton.device

    @property
    def network(self) -> nn.Module:
        return self._skeleton.net

    def forward(self, batch: Batch, task: str | None = None) -> Tensor:
        self.chain(task)
        with nullcontext() if self._skeleton.in_place else self.applied():
            return super().forward(batch, task)

    def fitted(self, name: str, tensor: Tensor) -> Tensor:
        """A merged tensor's other value, on the device and in the type that it stands in the network."""
        return tensor.to(self._skeleton.device, self._skeleton.dtypes[name])

    @contextmanager
    def placed(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Tensors in the merged tensors' places for the length of the block."""
        if self._skeleton.in_place:
            raise RuntimeError("Merged weights are in place already; `applied()` and `step()` do not nest.")
        self._skeleton.in_place = True
        try:
            with swapped(self._skeleton.sites, weights):
                yield
        finally:
            self._skeleton.in_place = False

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The network with the merged weights in place, made once; keep backward inside the block as well."""
        with self.placed(self.weights()):
            yield self._skeleton.net

    @contextmanager
    def step(
        self,
        *,
        of: Iterable[str] | None = None,
        values: Mapping[str, Tensor] | None = None,
        noise: int | None = None,
        weights: bool = True,
    ) -> Iterator[Step]:
        """One materialisation, any number of forwards and `Step.backward`, one pull-back at the end.

        Every trainable parameter enters as a detached leaf, so that nothing in here touches the gradients and hooks of
        the parameters that an optimiser or DDP watches; `Step.scalar` hands the gradients over.

        Args:
            of: Names of the parameters whose gradients are wanted; the learnables by default.
            values: Other values for some parameters, by name, for the length of the step.
            noise: Seeds what the rule draws; without it the rule draws nothing.
            weights: Put the merged weights in place; without them only features that are in the batch can be asked for.
        """
        learnables, values = self.learnables(), values or {}
        wanted = set(learnables if of is None else of)
        leaves = {
            name: values.get(name, parameter).detach().requires_grad_(name in wanted)
            for name, parameter in self.trainable().items()
        }
        with self._drawing(noise), swapped(self._sites(leaves), leaves):
            # A cut before the merge as well: reentrant checkpointing walks each tensor's graph on its own, and
            # would find what the tensors share freed after the first.
            begun, tree = tree_flatten(self.rule.begin() if weights and self._held is None else None)
            shared = [leaf_of(value) for value in begun]
            made = dict(self._held or self._weights(tree_unflatten(shared, tree))) if weights else {}
            entering = {name: leaf_of(weight) for name, weight in made.items()} if self.apply_mode == "leaf" else made

            def pull(keep: bool) -> dict[str, Tensor]:
                for name in list(made) if self.apply_mode == "leaf" else ():  # what a tensor held is freed with it
                    root, leaf = (made[name], entering[name]) if keep else (made.pop(name), entering.pop(name))
                    pull_back([root], [leaf], keep=keep)
                pull_back(begun, shared, keep=keep)
                found = {name: leaf.grad for name, leaf in leaves.items() if name in wanted}
                for leaf in leaves.values():
                    leaf.grad = None
                return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in found.items()}

            step = Step(learnables, self._skeleton.device, self.apply_mode == "swap", pull)
            with self.placed(entering) if weights else nullcontext():
                yield step
                step.flush()
            step.end()

    @contextmanager
    def graph(self, values: Mapping[str, Tensor], *, noise: int | None = None) -> Iterator[None]:
        """The merged weights in place with their whole graph, for gradients of gradients.

        Args:
            values: By name, what the parameters are made of for the length of the block.
            noise: As for `step`.
        """
        with self._drawing(noise), swapped(self._sites(values), values), self.placed(self.weights()):
            yield

    def _sites(self, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
        return {name: self._places[name] for name in names}

    @contextmanager
    def _drawing(self, noise: int | None) -> Iterator[None]:
        self.rule.draw_(noise)
        try:
            yield
        finally:
            self.rule.draw_(None)

    @torch.no_grad()
    def materialize(self, *, dtype: torch.dtype | None = None) -> nn.Module:
        """A plain copy of the network with the merged weights as its parameters; it needs nothing of adamerge.

        Args:
            dtype: Cast once, at the end, from the fp32 merge; by default each tensor keeps the network's dtype.
        """
        skeleton, shared = self._skeleton, self.rule.begin()
        if skeleton.in_place:
            raise RuntimeError("Merged weights are in place; materialize outside of `applied()` and `step()`.")
        net = copy.deepcopy(skeleton.net)
        twin = dict(zip(map(id, skeleton.net.modules()), net.modules(), strict=True))
        for name, places in skeleton.sites.items():
            parameter = nn.Parameter(self._make(name, shared, dtype))
            for module, attribute in places:
                put(twin[id(module)], attribute, parameter)
        return net if dtype is None else net.to(dtype)

    def folded(self, *, dtype: torch.dtype | None = None) -> MultiTaskModel:
        """The same answers from a dense network: no task vectors kept, nothing left to train."""
        chains = {task: copy.deepcopy(self.chain(task)) for task in self.tasks}
        return MultiTaskModel(self.backbone, self.materialize(dtype=dtype), chains).requires_grad_(False).eval()
