import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from adamerge.backbones.base import batch_size
from adamerge.learnables import learnables_of
from adamerge.loops.joint import Joint, check_reached, part_of
from adamerge.loops.tally import Tally, counts_of
from adamerge.ranks import sum_over_ranks, world_size
from adamerge.types import Batch, InputError, some

if TYPE_CHECKING:
    from adamerge.module import AdaMerge


def adam(parameters: Any) -> Optimizer:
    """The default inner optimiser: one fresh step of Adam moves every coefficient by its rate."""
    return torch.optim.Adam(parameters, lr=0.1)


class Bilevel(Joint):
    """Outer learnables are trained for what the inner ones become after one step of their own.

    Each step: from where they stand, the inner learnables make one fresh optimiser step on the first half of every
    task's batch; the outer ones then get the gradient of the loss on the second half. The inner ones go back; a later
    phase trains them for good. Both halves see the same mask. Inner gradients are averaged over ranks.

    Args:
        inner: Regular expression of the inner learnables' names, from their beginning. They are not among those that
            the optimiser trains.
        inner_optimizer: Makes the inner optimiser, anew in each step; Adam at 0.1 by default.
        second_order: Let the gradient flow through the inner step; for SGD. It costs a double backward for each task.
        order: As for `Joint`.
        micro_batch: As for `Joint`; of each half.

    Raises:
        InputError: Not a regular expression.

    Source: Concrete AdaMerging, arXiv 2312.06173. Deviations from its code: the inner gradient is taken at the current
    mask, not at the weights of the step before; the inner optimiser keeps no moments from step to step.
    """

    smallest_batch: ClassVar[int] = 2  # one for each level

    def __init__(
        self,
        *,
        inner: str = r"rule\.inner\.",
        inner_optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        second_order: bool = False,
        order: Literal["auto", "per_task", "concatenated"] = "auto",
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(order=order, micro_batch=micro_batch)
        try:
            self._inner = re.compile(inner)
        except re.error as error:
            raise InputError(f"`loop.inner` is no regular expression: '{inner}' ({error}).") from error
        self._make_optimizer = inner_optimizer or adam
        self._second_order = second_order

    def _inner_of(self, module: "AdaMerge") -> dict[str, nn.Parameter]:
        found = learnables_of(module.model).items()
        matching = {id(each.parameter) for name, each in found if self._inner.match(name)}
        return {name: p for name, p in module.model.trainable().items() if id(p) in matching}

    def problems(self, module: "AdaMerge") -> Iterator[str]:
        yield from super().problems(module)
        inner, trained = self._inner_of(module), module.model.learnables()
        if not inner:
            yield (
                f"`loop.inner` is '{self._inner.pattern}', which matches no learnable; there are "
                f"{some(learnables_of(module.model))}."
            )
        both = sorted(set(inner) & set(trained))
        if both:
            yield (
                f"`loop.inner` matches {', '.join(both[:3])}, which the optimiser trains as well; leave the inner "
                "learnables out of `train`, and train them in a later phase."
            )
        shared = [name for name in inner if name.startswith("rule.")]
        if shared and module.model.is_fixed:
            yield (
                f"`loop.inner` matches {', '.join(shared[:3])}, but no other learnable of the rule is trained, and so "
                "the weights are merged once for all steps; train some of the rule, or take it out of `loop.inner`."
            )
        optimizer = self._make_optimizer([torch.zeros(1, requires_grad=True)])
        if self._second_order and not isinstance(optimizer, torch.optim.SGD):
            yield (
                f"`loop.second_order` differentiates the inner step, which is {type(optimizer).__name__}; set "
                "`loop.inner_optimizer` to torch.optim.SGD."
            )
        if self._second_order and self._concatenates(module):
            yield "`loop.second_order` goes task by task: set `loop.order` to per_task and `apply_mode` to leaf."
        coupled = [type(objective).__name__ for objective in module.objectives if objective.couples_batch]
        if self._second_order and coupled and world_size() > 1:
            yield (
                f"`loop.second_order` cannot differentiate {', '.join(coupled)} twice over several ranks; leave one of "
                "them out, or set `trainer.devices` to 1."
            )

    def step(self, module: "AdaMerge", batches: Mapping[str, Batch]) -> Tensor:
        small = [task for task, batch in batches.items() if batch_size(batch) < 2]
        if small:
            raise InputError(f"A bilevel step splits each batch in two, but `data.batch_size` is 1 ({small[0]}).")
        first = {task: part_of(batch, slice(batch_size(batch) // 2)) for task, batch in batches.items()}
        second = {task: part_of(batch, slice(batch_size(batch) // 2, None)) for task, batch in batches.items()}
        inner, outer = self._inner_of(module), module.model.learnables()
        values = self._stepped(inner, self._inner_gradients(module, first, inner))
        tally, wanted = Tally(), [*outer, *inner] if self._second_order else list(outer)
        with module.step(second, of=wanted, values=values) as step:
            for _ in self.passes(module, step, tally, second):
                pass
            penalties = module.penalize(step)
        check_reached(step, module, batches)
        if self._second_order:
            toward = {name: _averaged(step.gradients[name]) for name in inner}
            for name, gradient in self._through(module, first, inner, outer, toward).items():
                step.gradients[name] -= self._rate * gradient
        return step.scalar(module.report(tally.values(), penalties))

    def _inner_gradients(
        self, module: "AdaMerge", batches: Mapping[str, Batch], inner: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        tally = Tally()
        with module.step(batches, of=inner) as step:
            for _ in self.passes(module, step, tally, batches):
                pass
            penalties = module.penalize(step)
        if not step.reached:
            raise InputError(
                f"`loop.inner` names {some(inner)}, of which the objectives say nothing; name what they depend on."
            )
        losses = [value for terms in tally.values().values() for value in terms.values()]
        module.note("train/inner_loss", torch.stack([*losses, *penalties.values()]).sum())
        return {name: _averaged(gradient) for name, gradient in step.gradients.items()}

    def _stepped(self, inner: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inner learnables after one fresh step; themselves unchanged."""
        values = {name: parameter.detach().clone().requires_grad_() for name, parameter in inner.items()}
        for name, value in values.items():
            value.grad = gradients[name]
        self._make_optimizer(list(values.values())).step()
        return values

    @property
    def _rate(self) -> float:
        """How far a fresh step goes against a slope of one, which `nesterov` and `maximize` change too."""
        probe = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        probe.grad = torch.ones_like(probe)
        self._make_optimizer([probe]).step()
        return -probe.item()

    def _through(
        self,
        module: "AdaMerge",
        batches: Mapping[str, Batch],
        inner: Mapping[str, nn.Parameter],
        outer: Mapping[str, nn.Parameter],
        toward: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The gradient, by the outer learnables, of the inner loss's slope in the direction `toward`."""
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in {**inner, **outer}.items()}
        inside, found = [leaves[name] for name in inner], {name: torch.zeros_like(p) for name, p in outer.items()}
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH), module.model.graph(leaves, noise=module.noise):
            for task, batch in batches.items():
                with module.model.attached(task):
                    terms = module.terms(module.respond(task, batch), batch)
                    loss = Tally().loss(task, terms, sum_over_ranks(counts_of(terms)))
                    grad = partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
                    slopes = grad(loss, inside, create_graph=True)
                    along = torch.stack([(s * toward[n]).sum() for s, n in zip(slopes, inner, strict=True)]).sum()
                    for name, gradient in zip(outer, grad(along, [leaves[name] for name in outer]), strict=True):
                        found[name] += gradient
        return found


def _averaged(gradient: Tensor) -> Tensor:
    return sum_over_ranks(gradient).div_(world_size())
