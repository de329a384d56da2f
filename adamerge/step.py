"""One optimiser step through a merged model: gradients are collected on leaves, and handed over at the end."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.freed import give_back


def leaf_of(value: Any) -> Any:
    """A tensor cut from its graph, to collect its gradient; other values pass."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def pull_back(roots: Iterable[Any], leaves: Iterable[Any], *, keep: bool) -> None:
    """Send the leaves' gradients backward through the tensors they were cut from; they are taken off the leaves."""
    reached: list[tuple[Any, Tensor]] = []
    for root, leaf in zip(roots, leaves, strict=True):
        if getattr(leaf, "grad", None) is not None:
            reached.append((root, leaf.grad))
            leaf.grad = None
    if reached:
        torch.autograd.backward([root for root, _ in reached], [grad for _, grad in reached], retain_graph=keep)


class Step:
    """One optimiser step through the model: run forwards, hand each loss to `backward`, return `scalar` at the end.

    Attributes:
        gradients: By name, when the step has ended; a loop may put others in their place before it asks for `scalar`.
    """

    def __init__(
        self,
        learnables: Mapping[str, nn.Parameter],
        device: torch.device,
        at_once: bool,
        pull: Callable[[bool], dict[str, Tensor]],
    ) -> None:
        self._learnables, self._device, self._at_once, self._pull = learnables, device, at_once, pull
        self._pending: list[Tensor] = []
        self.reached = False  # some loss depends on what is trained
        self.gradients: dict[str, Tensor] = {}

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a loss [], outside of autocast; in `swap` mode, when the step ends.

        A loss that depends on nothing that is trained adds nothing.
        """
        if not loss.requires_grad:
            return
        self.reached = True
        self._pending.append(loss)
        if not self._at_once:
            self.flush()

    def flush(self) -> None:
        """Send backward what waits; the weights must still be in place."""
        if self._pending:
            with torch.autocast(self._device.type, enabled=False):
                torch.stack(self._pending).sum().backward()
            self._pending = []
            if self._device.type == "cpu":
                give_back()

    def taken(self) -> dict[str, Tensor]:
        """The gradients of what was sent backward so far, by name; they do not count into those of the whole step.

        For `leaf` mode. Costs one contraction with the task vectors.
        """
        self.flush()
        return self._pull(True)

    def end(self) -> None:
        """Contract with the task vectors, once; called by the model when the block ends."""
        self.flush()
        self.gradients = self._pull(False)

    def scalar(self, value: Tensor) -> Tensor:
        """A scalar of the given value whose backward hands every learnable the gradient that this step has found."""
        found, self.gradients = self.gradients, {}  # held once
        return _Handed.apply(
            value.detach().float(), [found[name] for name in self._learnables], *self._learnables.values()
        )


class _Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *learnables: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, []
        return None, None, *[gradient.mul_(scale.to(gradient.dtype)) for gradient in gradients]
