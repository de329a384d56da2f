"""The storage of one tensor's T task vectors, and its two products.

`combine` and `inner` are each other's adjoint: both are linear, and the gradient of each is the other, to any order.
Products accumulate in fp32 (fp64 where anything is fp64), whatever the vectors are stored in.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from adamerge import native

# Elements of one task per step: the fp32 copies of a chunk of narrow vectors stay in the last-level cache.
CHUNK = 1 << 17


class Deltas(ABC):
    """One tensor's T task vectors: coefficients broadcastable to [T, *S] -> merged [*S], and back by `inner`."""

    num_tasks: int
    shape: torch.Size  # S
    dtype: torch.dtype
    device: torch.device

    def combine(self, coef: Tensor, base: Tensor | None = None) -> Tensor:
        """Sum over t of coef[t] * tau_t, plus the base [*S] if given: [*S], differentiable in `coef`.

        Args:
            coef: Broadcastable to [T, *S]: [T, 1, …] or [T] for one scalar per task, [T, 1, D] for one per column.
            base: Added without an extra pass; no gradient flows to it.
        """
        return _Combine.apply(coef, self, base)

    def inner(self, grad: Tensor, coef_shape: torch.Size | None = None) -> Tensor:
        """The adjoint: for a gradient [*S] of the merged tensor, the gradient of the coefficients.

        Args:
            grad: [*S].
            coef_shape: Shape of the coefficients it is summed to; [T] when not given. Differentiable in `grad`.
        """
        return _Inner.apply(grad, self, coef_shape or torch.Size([self.num_tasks]))

    @abstractmethod
    def dense(self) -> Tensor:
        """[T, *S]; for tests and small tensors."""

    @abstractmethod
    def _combine(self, coef: Tensor, base: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _inner(self, grad: Tensor, coef_shape: torch.Size) -> Tensor: ...


class DenseDeltas(Deltas):
    """All T vectors as one tensor [T, *S] of any floating dtype, in memory, on a device, or memory-mapped."""

    def __init__(self, stacked: Tensor) -> None:
        self.stacked = stacked
        self.num_tasks, self.shape = stacked.shape[0], stacked.shape[1:]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.stacked.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.stacked.device

    def dense(self) -> Tensor:
        return self.stacked

    def _combine(self, coef: Tensor, base: Tensor | None) -> Tensor:
        dtype = _accumulator(coef, self.stacked, base)
        coef = coef.to(self.device, dtype)
        if _is_scalar_per_task(coef.shape, self.num_tasks):
            delta_TN, coef_1T = self.stacked.reshape(self.num_tasks, -1), coef.reshape(1, -1)
            base_N = None if base is None else base.reshape(-1).to(self.device, dtype)
            made_N = native.combine(delta_TN, coef_1T[0], base_N)
            if made_N is not None:
                return made_N.view(self.shape)
            out_N = torch.empty(delta_TN.shape[1], dtype=dtype, device=self.device)
            for start, delta_Tn in _chunks(delta_TN, dtype):
                part = slice(start, start + delta_Tn.shape[1])
                if base_N is None:
                    torch.mm(coef_1T, delta_Tn, out=out_N[None, part])
                else:
                    torch.addmm(base_N[None, part], coef_1T, delta_Tn, out=out_N[None, part])
            return out_N.view(self.shape)
        out = (
            torch.zeros(self.shape, dtype=dtype, device=self.device)
            if base is None
            else base.to(self.device, dtype, copy=True)
        )
        for delta, per_task in zip(self.stacked, _per_task(coef, self), strict=True):
            for rows, part in _rows(delta, per_task):
                out[rows].addcmul_(delta[rows].to(dtype), part)
        return out

    def _inner(self, grad: Tensor, coef_shape: torch.Size) -> Tensor:
        dtype = _accumulator(grad, self.stacked)
        if _is_scalar_per_task(coef_shape, self.num_tasks):
            delta_TN, grad_N = self.stacked.reshape(self.num_tasks, -1), grad.reshape(-1).to(self.device, dtype)
            made_T = native.inner(delta_TN, grad_N)
            if made_T is not None:
                return made_T.view(coef_shape)
            out_T = torch.zeros(self.num_tasks, dtype=dtype, device=self.device)
            for start, delta_Tn in _chunks(delta_TN, dtype):
                out_T.addmv_(delta_Tn, grad_N[start : start + delta_Tn.shape[1]])
            return out_T.view(coef_shape)
        out = torch.zeros(coef_shape, dtype=dtype, device=self.device)
        grad = grad.to(self.device, dtype)
        for delta, per_task in zip(self.stacked, _per_task(out, self), strict=True):
            for rows, part in _rows(delta, per_task):
                part.add_((delta[rows] * grad[rows]).sum_to_size(part.shape))
        return out


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _is_scalar_per_task(coef_shape: torch.Size, num_tasks: int) -> bool:
    return len(coef_shape) > 0 and coef_shape[0] == num_tasks and coef_shape.numel() == num_tasks


def _per_task(coef: Tensor, deltas: Deltas) -> Tensor:
    """A view of the coefficients as [T, …] of the tensor's rank; what the tasks share repeats."""
    if coef.dim() <= 1:
        coef = coef.view(-1, *[1] * len(deltas.shape))
    if coef.dim() != 1 + len(deltas.shape):
        raise ValueError(
            f"Coefficients of shape {list(coef.shape)} do not fit {deltas.num_tasks} tasks of {list(deltas.shape)}."
        )
    return coef.expand(deltas.num_tasks, *coef.shape[1:])


def _chunks(delta_TN: Tensor, dtype: torch.dtype) -> Any:
    """(start, [T, n]) over cache-sized column ranges; narrow vectors are widened into one reused buffer."""
    num_tasks, size = delta_TN.shape
    step = CHUNK if delta_TN.device.type == "cpu" else 64 * CHUNK
    width = min(step, size)
    buffer = None if delta_TN.dtype == dtype else torch.empty(num_tasks * width, dtype=dtype, device=delta_TN.device)
    for start in range(0, size, step):
        part = delta_TN[:, start : start + step]
        yield start, part if buffer is None else buffer[: part.numel()].view(part.shape).copy_(part)


def _rows(delta: Tensor, per_task: Tensor) -> Any:
    """(rows, the coefficients of these rows) in ranges of about `CHUNK` elements."""
    if delta.dim() == 0:
        yield ..., per_task
        return
    step = max(1, CHUNK // max(1, delta[:1].numel()))
    for start in range(0, delta.shape[0], step):
        rows = slice(start, start + step)
        yield rows, per_task if per_task.shape[0] == 1 else per_task[rows]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coef: Tensor, deltas: Deltas, base: Tensor | None) -> Tensor:
        ctx.deltas, ctx.shape, ctx.dtype, ctx.device = deltas, coef.shape, coef.dtype, coef.device
        return deltas._combine(coef, base)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Inner.apply(grad, ctx.deltas, ctx.shape).to(ctx.device, ctx.dtype), None, None


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, deltas: Deltas, coef_shape: torch.Size) -> Tensor:
        ctx.deltas, ctx.dtype, ctx.device = deltas, grad.dtype, grad.device
        return deltas._inner(grad, coef_shape)

    @staticmethod
    def backward(ctx: Any, coef: Tensor) -> Any:
        return _Combine.apply(coef, ctx.deltas, None).to(ctx.device, ctx.dtype), None, None
