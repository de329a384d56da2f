"""Our side of a comparison with a peer: merges of the vision towers in `vit.py`, stepped without a trainer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from arms import Clock
from torch import Tensor, nn
from vit import SCALE, Inputs

from adamerge.backbones import Backbone
from adamerge.merged import MergedModel
from adamerge.module import AdaMerge
from adamerge.opened import kept_bytes
from adamerge.rules import MergeRule
from adamerge.space import ParamSpace
from adamerge.task_modules import TaskModule, ZeroShotHead
from adamerge.task_vectors import TaskVectors
from adamerge.types import Batch, TaskInfo


class Summed(AdaMerge):
    """Needs no trainer. Left out are logging and the comparisons of the losses with infinity."""

    def report(self, values, penalties):
        return torch.stack([value for terms in values.values() for value in terms.values()]).sum()


class Vision(Backbone):
    """The tower; the projection behind it is not merged, as in FusionBench."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def build(self) -> nn.Module:
        return self._inputs.base()

    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        return self._inputs.projection(net(batch["pixels"]).pooler_output)

    def head(self, task: TaskInfo) -> TaskModule:
        return ZeroShotHead(task, self._inputs.heads[task.name], SCALE)


def merged(
    inputs: Inputs,
    rule: Callable[[TaskVectors], MergeRule],
    *,
    before_head: Callable[[Inputs, str], TaskModule] | None = None,
    narrow: bool = False,
    **options: Any,
) -> MergedModel:
    """The task vectors in memory; of the experts, one tensor is made at a time."""
    backbone = Vision(inputs)
    net = backbone.build()
    base = {name: parameter.detach() for name, parameter in net.named_parameters()}
    experts = {task: inputs.weights(task, base) for task in inputs.tasks}
    vectors = TaskVectors.load(ParamSpace.of(net), base, experts)
    first = {task: [before_head(inputs, task)] if before_head else [] for task in inputs.tasks}
    chains = {task: [*first[task], backbone.head(TaskInfo(task))] for task in inputs.tasks}
    with kept_bytes(net) as kept, torch.autocast("cpu", torch.bfloat16, enabled=narrow):  # as a run does
        backbone.features(net, {"pixels": inputs.batches[inputs.tasks[0]]})
    model = MergedModel(backbone, net, vectors, rule(vectors), chains, **options).train()
    model.activations = kept()
    return model


def run(module: AdaMerge, batches: Mapping[str, Batch], clock: Clock, *, narrow: bool = False) -> None:
    """All steps of an arm, the optimiser's as well; `narrow`: as under Lightning's `bf16-mixed`."""
    optimizer = module.configure_optimizers()
    for _ in range(clock.steps):
        clock.mark()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow, cache_enabled=False):
            total = module.loop.step(module, batches)
        optimizer.zero_grad()
        total.backward()
        module.finite.gradients(module.model.learnables(), 0)  # as a trainer has it done
        optimizer.step()
        module.finite.updated(module.model.learnables(), 0)
