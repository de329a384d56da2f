import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adamerge.deltas import Deltas
from adamerge.rules.base import MergeRule
from adamerge.rules.coefficients import LayerWise, TaskWise
from adamerge.seeding import seed_of
from adamerge.task_vectors import TaskVectors
from adamerge.types import InputError

_SMALLEST = 2.0**-25  # below the smallest step of fp32 noise, so that its logit is finite
_LEAST = 2.0**-60  # of a mask's mean: the gradient divides by its square, which fp32 still holds


class Concrete(MergeRule):
    """One mask over all weights, shared by all tasks: theta_0 + m / mean(m) * sum_t coef[t] * tau_t.

    While its logits learn, m is a relaxed Bernoulli draw sigmoid((logits + logistic noise) / temperature), the same on
    all ranks; everywhere else it is the mask that `evaluation` says. The mean is over each tensor. It is divided out of
    the coefficients, so that a merged tensor keeps two tensors of its size for backward, whatever T.

    Args:
        vectors: Task vectors to merge.
        rule: Makes the rule whose coefficients stand before the task vectors: `LayerWise` or `TaskWise`, learned along
            or fixed by their `trainable`.
        temperature: Of the relaxed draw, above 0; the smaller, the closer to zeros and ones.
        logit: Initial logit; 0 for a density of one half. Not `init`, which a file stacked below sets for another rule.
        evaluation: The mask outside of training: `expected`, sigmoid(logits); `threshold`, 1 where the logit is at
            least 0; `sampled`, one binary draw.
        seed: Of that draw.
        density: Factor of the mean of sigmoid(logits), added to the loss; 0 for none.
        saved_as: In what the logits are saved; `bfloat16` halves the file. They are trained in fp32, and the run scores
            what it saves.

    Raises:
        InputError: A rule without one coefficient per task and tensor, or a temperature that is not above 0.

    Source: Concrete Subspace Learning, arXiv 2312.06173. Deviations: evaluation does not depend on an unseeded draw,
    and the mean is divided out of expected and binary masks too.
    """

    bounded = ("logits.",)  # seen through a sigmoid alone

    def __init__(
        self,
        vectors: TaskVectors,
        *,
        rule: Callable[[TaskVectors], LayerWise] = TaskWise,
        temperature: float = 0.5,
        logit: float = 0.0,
        evaluation: Literal["expected", "threshold", "sampled"] = "expected",
        seed: int = 0,
        density: float = 0.0,
        saved_as: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__(vectors)
        if not 0 < temperature < math.inf:
            raise InputError(f"`rule.temperature` is {temperature}; it is a number above 0.")
        if not (math.isfinite(logit) and 0 <= density < math.inf):
            raise InputError(
                f"`rule.logit` is {logit} and `rule.density` {density}; both are numbers, density not below 0."
            )
        self.inner = rule(vectors)
        if not isinstance(self.inner, LayerWise):
            raise InputError(
                f"`rule.rule` makes a {type(self.inner).__name__}; a mask stands over LayerWise or TaskWise."
            )
        self.groups = self.inner.groups
        self.axes = MappingProxyType({f"inner.{name}": axes for name, axes in self.inner.axes.items()})
        self.logits = nn.ParameterDict(
            {_key(name): torch.full(shape, float(logit)) for name, shape in vectors.space.shapes.items()}
        )
        self._temperature, self._evaluation, self._seed, self._density = temperature, evaluation, seed, density
        self._drawn: int | None = None
        self._kept: dict[str, tuple[Any, Tensor]] = {}  # of `_draw`: what a mask was made of, and the mask
        self.saved_as = MappingProxyType({"logits.": getattr(torch, saved_as)})

    def draw_(self, seed: int | None) -> None:
        learns = any(logits.requires_grad for logits in self.logits.values())
        self._drawn = seed if learns else None

    def begin(self) -> tuple[Tensor, ...]:
        return self.inner.begin()

    def merge(self, name: str, base: Tensor, deltas: Deltas, shared: tuple[Tensor, ...]) -> Tensor:
        mask = self.mask(name)
        mean = mask.mean().clamp(min=_LEAST)  # an empty mask gives the base
        delta = deltas.combine(self.inner.of_tensor(name, shared).to(mask) / mean)
        return (mask * delta.to(mask)).add_(base.to(mask))  # less memory in backward than torch.addcmul

    def mask(self, name: str) -> Tensor:
        """One tensor's mask as it stands, [*S] in [0, 1], before it is divided by its mean."""
        logits = self.logits[_key(name)]
        if self._drawn is not None:
            return self._draw(name, logits, seed_of(self._drawn, name))
        if self._evaluation == "threshold":
            return (logits >= 0).to(logits.dtype)
        if self._evaluation == "sampled":
            return (logits + _logistic(logits, seed_of(self._seed, name)) >= 0).to(logits.dtype)
        return torch.sigmoid(logits)

    def _draw(self, name: str, logits: Tensor, seed: int) -> Tensor:
        """A relaxed draw; one that needed no gradient, for the coefficients' own step, serves once more."""
        made_of = seed, logits.data_ptr(), logits._version
        was_of, mask = self._kept.pop(name, (None, None))
        if was_of != made_of:
            mask = None
        drawn: Tensor = _Relaxed.apply(logits, self._temperature, seed, mask)
        if not logits.requires_grad:
            self._kept[name] = made_of, drawn
        return drawn

    def coefficients(self) -> Tensor | None:
        return self.inner.coefficients()

    def project_(self) -> None:
        self.inner.project_()

    def penalty(self) -> Mapping[str, Tensor]:
        if not self._density:
            return self.inner.penalty()
        total = sum(logits.numel() for logits in self.logits.values())
        kept = torch.stack([torch.sigmoid(logits).sum() for logits in self.logits.values()]).sum()
        return {**self.inner.penalty(), "density": self._density * kept / total}


class _Relaxed(torch.autograd.Function):
    """sigmoid((logits + noise) / temperature), [*S], made in the memory of its result unless it is given."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, seed: int, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = _logistic(logits, seed).add_(logits).div_(temperature).sigmoid_()
        else:
            mask = mask.view_as(mask)  # autograd wants a tensor of its own
        ctx.temperature = temperature
        ctx.save_for_backward(mask)
        return mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.sigmoid_backward(grad, mask).div_(ctx.temperature), None, None, None


def _key(name: str) -> str:
    return name.replace(".", "/")  # no dots in the names of parameters


def _logistic(like: Tensor, seed: int) -> Tensor:
    """Standard logistic noise, [*S]: the same for the same seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    noise = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return noise.clamp_(min=_SMALLEST).logit_()
