"""One network that answers for several tasks, merged or not."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.backbones import Backbone
from adamerge.backbones.base import to_device
from adamerge.task_modules import TaskModule
from adamerge.types import KEPT, Batch, InputError, TaskOutput

Chains = Mapping[str, Sequence[TaskModule]]


class MultiTaskModel(nn.Module):
    """model(batch, task="svhn") -> logits [B, C]: one network and per task the modules after its features.

    Attributes:
        tasks: The names it answers to.
    """

    def __init__(self, backbone: Backbone, net: nn.Module, chains: Chains) -> None:
        super().__init__()
        self.backbone, self.tasks = backbone, tuple(chains)
        self.net = net
        self.task_modules = nn.ModuleList(nn.ModuleList(chain) for chain in chains.values())

    def chain(self, task: str | None) -> list[TaskModule]:
        """The task's modules, in the order they are applied.

        Raises:
            InputError: No such task.
        """
        if task not in self.tasks:
            raise InputError(
                f"The model knows the tasks {', '.join(self.tasks)}; asked for {task!r}; call model(batch, task=…)."
            )
        chain = self.task_modules[self.tasks.index(task)]
        assert isinstance(chain, nn.ModuleList)
        return [module for module in chain if isinstance(module, TaskModule)]

    @contextmanager
    def attached(self, task: str | None) -> Iterator[None]:
        """The task's modules at work inside the network; the block must span forward and backward."""
        with ExitStack() as stack:
            for module in self.chain(task):
                stack.enter_context(module.attach(self.network))
            yield

    @property
    def network(self) -> nn.Module:
        """The network, whatever weights stand in it."""
        return self.net

    def classes(self, task: str) -> Sequence[str]:
        """The class names of a task, in the order of its logits."""
        return self.chain(task)[-1].classes

    def prepare(self, samples: Sequence[Mapping[str, Any]], task: str | None = None) -> Batch:
        """Raw samples, say `[{"image": Image.open(path)}]`, as a batch on the model's device.

        Args:
            samples: Without labels.
            task: Whose samples they are, where that makes a difference (prompts that differ from task to task).

        Raises:
            InputError: They are no list of samples, or there are none.
        """
        if isinstance(samples, Mapping | str) or not all(isinstance(sample, Mapping) for sample in samples):
            raise InputError('`prepare` takes a list of samples, each with its inputs by name: [{"image": picture}].')
        if not samples:
            raise InputError("`prepare` was given no samples.")
        prepare = self.backbone.prepare if task is None else self.backbone.preparer(task)
        batch = self.backbone.collate([prepare(sample) for sample in samples])
        return to_device(batch, self.device)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def bare_net(self) -> nn.Module:
        """The network itself."""
        return self.net

    def features(self, batch: Batch) -> Tensor:
        """Merged features [B, D], before any task's modules; those that were kept stand in the batch."""
        return batch[KEPT] if KEPT in batch else self.backbone.features(self.bare_net(), batch)

    def answer(self, task: str | None, features_BD: Tensor) -> TaskOutput:
        """From merged features to the task's output, in at least fp32; its features are what enters the last module."""
        features = features_BD.to(torch.promote_types(features_BD.dtype, torch.float32))
        *before, last = self.chain(task)
        for module in before:
            features = module(features)
        return TaskOutput(str(task), features, last(features).to(features.dtype))

    def respond(self, task: str | None, batch: Batch) -> TaskOutput:
        """The task's output on a batch, with whatever weights stand in the network."""
        return self.answer(task, self.features(batch))

    def forward(self, batch: Batch, task: str | None = None) -> Tensor:
        with self.attached(task):
            return self.respond(task, batch).logits_BC

    def train(self, mode: bool = True) -> Any:
        """Frozen parts stay in eval, so that dropout and BatchNorm never move."""
        super().train(mode)
        self.net.eval()
        for module in self.modules():
            if isinstance(module, TaskModule) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self
