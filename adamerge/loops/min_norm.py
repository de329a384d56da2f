"""The shortest vector in the convex hull of the tasks' gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

_STEPS = 250  # of Frank-Wolfe on T numbers, all on the device


def min_norm_weights(gram_TT: Tensor) -> Tensor:
    """Weights [T] >= 0 with sum 1 for which sum_t weight_t g_t is shortest, from the products <g_s, g_t>.

    Source: MGDA as in arXiv 1810.04650: Frank-Wolfe with the line search in closed form. Deviation: each step moves
    weight from the worst gradient that has some to the best, which converges linearly. Nothing waits for the device.
    """
    weight_T = torch.full_like(gram_TT[0], 1 / len(gram_TT))
    for _ in range(_STEPS):
        slope_T = gram_TT @ weight_T
        held_T = slope_T.masked_fill(weight_T <= 0, -torch.inf)
        best_T = torch.zeros_like(slope_T).scatter(0, slope_T.argmin(0, keepdim=True), 1.0)
        worst_T = torch.zeros_like(slope_T).scatter(0, held_T.argmax(0, keepdim=True), 1.0)
        towards_T = best_T - worst_T
        curvature = towards_T @ gram_TT @ towards_T
        size = -(towards_T @ slope_T) / curvature.clamp(min=torch.finfo(gram_TT.dtype).tiny)
        weight_T = weight_T + size.clamp(min=0).minimum(weight_T @ worst_T) * towards_T
    return weight_T


def gram(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """The products of T gradients of several tensors, [T, T]."""
    flat_TN = (torch.stack([tensor.reshape(-1) for tensor in tensors]) for tensors in zip(*gradients, strict=True))
    return torch.stack([g_TN @ g_TN.T for g_TN in flat_TN]).sum(0)
