import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from adamerge.deltas import Deltas
from adamerge.rules.base import MergeRule
from adamerge.task_vectors import TaskVectors
from adamerge.types import InputError


class _Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]  # raw [T, G] -> coefficients [T, G]
    inverse: Callable[[Tensor], Tensor]
    low: float = -math.inf
    high: float = math.inf
    open: bool = False  # the bounds themselves are out of reach


_ACTIVATIONS = {
    "none": _Activation(lambda raw: raw, lambda coef: coef),
    "clamp": _Activation(lambda raw: raw.clamp(0, 1), lambda coef: coef, 0, 1),
    "clamp_ste": _Activation(lambda raw: raw + (raw.clamp(0, 1) - raw).detach(), lambda coef: coef, 0, 1),
    "sigmoid": _Activation(torch.sigmoid, torch.logit, 0, 1, open=True),
    "tanh": _Activation(torch.tanh, torch.atanh, -1, 1, open=True),
    "softmax": _Activation(lambda raw: raw.softmax(0), torch.log, 0, open=True),
}


_PENALTIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda coef, start: coef.abs().mean(),
    "l2": lambda coef, start: coef.square().mean(),
    "distance": lambda coef, start: (coef - start).square().mean(),
}


class LayerWise(MergeRule):
    """One coefficient per task and tensor group: theta_0 + sum_t coef[t, g] * tau_t.

    Args:
        vectors: Task vectors to merge; fix T and G.
        init: Initial coefficient, dimensionless; one for all or one per task. Under `softmax` only the ratios between
            tasks matter.
        activation: From the learnable to the coefficient. `none`; `clamp` to [0, 1], with zero gradient outside;
            `clamp_ste`, the same values with the gradient passed straight through; `sigmoid` (0, 1); `tanh` (-1, 1);
            `softmax` over tasks.
        trainable: Learn the coefficients; False for fixed ones, under masks or task modules that learn.
        penalties: Factors of what is added to the loss: `l1`, the mean |coefficient|; `l2`, the mean square;
            `distance`, the mean squared distance from `init`.

    Raises:
        InputError: `init` outside the activation's range, or naming other tasks than the vectors; an unknown penalty.

    Source: AdaMerging, arXiv 2310.02575, layer-wise variant; `tanh` as in SUPERMERGE, arXiv 2412.10416. Deviation:
    groups can be coarser than one tensor; the paper's clamp is an option, since it stops learning where a coefficient
    has left [0, 1].
    """

    axes = MappingProxyType({"raw_TG": ("task", "group")})

    def __init__(
        self,
        vectors: TaskVectors,
        *,
        init: float | Mapping[str, float] = 0.3,
        activation: Literal["none", "clamp", "clamp_ste", "sigmoid", "tanh", "softmax"] = "none",
        trainable: bool = True,
        penalties: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(vectors)
        self._group_of = self._choose_groups(vectors)
        self._activation = _ACTIVATIONS[activation]
        init_T = _per_task(init, self.tasks)
        low, high = self._activation.low, self._activation.high
        inside = (init_T > low) & (init_T < high) if self._activation.open else (init_T >= low) & (init_T <= high)
        if not bool((inside & init_T.isfinite()).all()):
            raise InputError(
                f"`rule.init` is {init}; with `rule.activation: {activation}` it lies "
                f"{'strictly between' if self._activation.open else 'between'} {low:g} and {high:g}."
            )
        raw_TG = self._activation.inverse(init_T)[:, None].repeat(1, len(self.groups))
        self.raw_TG = nn.Parameter(raw_TG, requires_grad=trainable)
        self._start_TG, self._penalties = self._activation.forward(raw_TG.clone()), dict(penalties or {})
        if set(self._penalties) - set(_PENALTIES):
            raise InputError(f"`rule.penalties` names {sorted(self._penalties)}; there are {', '.join(_PENALTIES)}.")

    def _choose_groups(self, vectors: TaskVectors) -> Mapping[str, int]:
        return vectors.space.group_of

    def coefficients(self) -> Tensor:
        """The coefficients [T, G] that the merge uses."""
        return self._activation.forward(self.raw_TG)

    def begin(self) -> tuple[Tensor, ...]:
        return self.coefficients().unbind(1)

    def merge(self, name: str, base: Tensor, deltas: Deltas, shared: tuple[Tensor, ...]) -> Tensor:
        return deltas.combine(self.of_tensor(name, shared), base)

    def of_tensor(self, name: str, shared: tuple[Tensor, ...]) -> Tensor:
        """One tensor's coefficients [T], from what `begin` gave."""
        return shared[self._group_of[name]]

    def penalty(self) -> Mapping[str, Tensor]:
        coef_TG = self.coefficients()
        start_TG = self._start_TG.to(coef_TG)
        return {name: factor * _PENALTIES[name](coef_TG, start_TG) for name, factor in self._penalties.items()}


class TaskWise(LayerWise):
    """One coefficient per task: the layer-wise rule with all tensors in one group; untrained, task arithmetic.

    Source: AdaMerging, arXiv 2310.02575, task-wise variant; Task Arithmetic, arXiv 2212.04089.
    """

    def _choose_groups(self, vectors: TaskVectors) -> Mapping[str, int]:
        self.groups = ("model",)
        return dict.fromkeys(vectors.space.shapes, 0)


def _per_task(init: float | Mapping[str, float], tasks: tuple[str, ...]) -> Tensor:
    if isinstance(init, Mapping):
        if set(init) != set(tasks):
            raise InputError(f"`rule.init` names the tasks {sorted(init)}; the merge has {sorted(tasks)}.")
        return torch.tensor([float(init[task]) for task in tasks])
    return torch.full((len(tasks),), float(init))
