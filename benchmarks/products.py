"""Claim: the two products of dense task vectors run near the speed at which the machine copies the same vectors.

`combine` reads [T, N] vectors and a base [N] and writes [N]; `inner` reads the vectors and a gradient [N]. Bandwidth is
the bytes that must be read and written, over the time; a copy reads and writes the vectors once. Freed memory is kept
for the next call: what is timed are the products, not how fast the system hands out pages for their results.

    python benchmarks/products.py
"""

import torch
from common import company, keep_freed_memory, median_seconds, show

from adamerge.deltas import DenseDeltas

TASKS = (2, 8, 20)
BYTES = 320e6  # of the vectors in fp32, more than a cache holds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(num_tasks: int, dtype: torch.dtype) -> dict[str, float]:
    """GB/s of the copy and of both products."""
    size = round(BYTES / num_tasks / 4)
    delta_TN = torch.randn(num_tasks, size).to(dtype)
    target_TN, deltas = torch.empty_like(delta_TN), DenseDeltas(delta_TN)
    coef_T, base_N, grad_N = torch.rand(num_tasks), torch.randn(size), torch.randn(size)
    vectors, one = delta_TN.numel() * dtype.itemsize, 4 * size
    moved = {"copy": 2 * vectors, "combine": vectors + 2 * one, "inner": vectors + one}
    seconds = median_seconds(
        {
            "copy": lambda: target_TN.copy_(delta_TN),
            "combine": lambda: deltas.combine(coef_T, base_N),
            "inner": lambda: deltas.inner(grad_N),
        }
    )
    return {name: moved[name] / seconds[name] / 1e9 for name in seconds}


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    rows = []
    for label, dtype in DTYPES.items():
        for num_tasks in TASKS:
            speed = measure(num_tasks, dtype)
            ratios = [speed[name] / speed["copy"] for name in ("combine", "inner")]
            rows.append(
                [f"T = {num_tasks}, {label}", *(f"{s:.1f}" for s in speed.values()), *(f"{r:.2f}" for r in ratios)]
            )
    show(
        "Effective bandwidth of combine (with base) and inner against Tensor.copy_ of the same vectors",
        f"T * N * 4 = {BYTES / 1e6:.0f} MB; coefficients, base, gradient fp32; medians of 7 after a warm-up{company()}",
        ["vectors", "copy GB/s", "combine GB/s", "inner GB/s", "combine / copy", "inner / copy"],
        rows,
    )


if __name__ == "__main__":
    main()
