"""Claim: a Concrete AdaMerging step takes less time and memory than FusionBench's.

The step of the first phase: one mask for all tasks, a step of the layer-wise coefficients under it on one batch of each
task, and the mask's own gradient and Adam on another. FusionBench by its own loop, ours by `Bilevel.step`. Before times
are compared, the gradients of the mask's logits in the first step, for which both draw the same noise, are asserted to
be the same. Each arm runs in a process of its own, one after the other.

    python benchmarks/concrete.py [--images 2] [--tasks 8] [--steps 5] [--small]
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from arms import MEMORY, PEER, WORKER, Clock, assert_same, compared
from common import company, show
from merges import Summed, merged, run
from torch import Tensor
from vit import INIT, SEED, Inputs

from adamerge.learnables import train_only
from adamerge.loops import Bilevel
from adamerge.merged import ApplyMode
from adamerge.rules import Concrete, LayerWise, concrete

TOLERANCE = 1e-3  # of the gradient's norm


def ours(inputs: Inputs, clock: Clock, mode: ApplyMode, loop: Bilevel) -> None:
    model = merged(
        inputs, lambda vectors: Concrete(vectors, rule=lambda each: LayerWise(each, init=INIT)), apply_mode=mode
    )
    train_only(model, "rule.logits")
    logits = {name.replace("/", "."): parameter for name, parameter in model.rule.logits.items()}
    clock.first_gradient(logits, reduced=True)
    batches = {task: {"pixels": torch.cat([pixels, pixels])} for task, pixels in inputs.batches.items()}
    with drawn_as_the_peer(clock, len(logits)):
        run(Summed(model, loop=loop), batches, clock)


@contextmanager
def drawn_as_the_peer(clock: Clock, number: int) -> Iterator[None]:
    """In the first step all masks' noise comes from one stream, begun anew for each of its merges."""
    calls, original = 0, concrete._logistic

    def logistic(like: Tensor, seed: int) -> Tensor:
        nonlocal calls
        if not clock.is_first:
            return original(like, seed)
        if calls % number == 0:
            torch.manual_seed(SEED)
        calls += 1
        eps = torch.finfo(like.dtype).eps
        return torch.rand(like.shape).clamp_(eps, 1 - eps).logit_()

    with patch.object(concrete, "_logistic", logistic):
        yield


OURS: dict[str, Callable[[Inputs, Clock], None]] = {
    "adamerge": lambda inputs, clock: ours(inputs, clock, "leaf", Bilevel()),
    "adamerge, swap": lambda inputs, clock: ours(inputs, clock, "swap", Bilevel()),
}


def compare(inputs: Inputs, steps: int) -> None:
    found = {arm: compared(__file__, arm, inputs.folder, steps) for arm in OURS}
    peer, _ = found["FusionBench"] = compared(WORKER, "concrete", inputs.folder, steps, peer=True)
    apart = max(assert_same(found[arm][0].gradients, peer.gradients, TOLERANCE) for arm in OURS)
    rows = []
    for arm, (each, kept) in found.items():
        times = [f"{each.step:.3f}", f"{peer.step / each.step:.2f}"]
        rows.append([arm, *times, *each.memory(), f"{kept / 1e6:,.0f}"])
    show(
        f"A Concrete AdaMerging step, mask and layer-wise coefficients: adamerge and {PEER}",
        f"{inputs.describe()} for the coefficients and as many for the mask; medians of {steps} steps; norms and "
        f"samples of the mask's first gradients differ by {apart:.0e} at most (asserted: {TOLERANCE:.0e}){company()}",
        ["step", "seconds", "FusionBench's over it", *MEMORY, "MB at the peak by default"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="per task, for each of the two levels")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="that are counted; one is run before them")
    parser.add_argument("--small", action="store_true", help="a small tower, to see that all works")
    asked = parser.parse_args()
    shape = "small" if asked.small else "ViT-B/32"
    with tempfile.TemporaryDirectory() as name:
        compare(Inputs.write(Path(name), shape=shape, tasks=asked.tasks, images=asked.images), asked.steps)


if __name__ == "__main__":
    Clock.run(OURS, sys.argv[1:]) if sys.argv[1:2] and sys.argv[1] in OURS else main()
