"""Claims: a layer-wise AdaMerging step costs little beside a plain one, and less time and memory than FusionBench's.

The whole steps, gradients of the coefficients and Adam included: FusionBench's by its own loop, ours by `Joint.step`
without a trainer. Beside them a plain forward and backward of one model on the same batches, with its gradients in the
weights. Weights, heads, batches and entropy are the same for all, and before times are compared, the coefficients'
gradients of the first step are asserted to be the same. Each arm runs in a process of its own, one after the other.

Memory is measured twice: as processes are by default, where the C library keeps much of what is freed, and with
`MALLOC_MMAP_THRESHOLD_=65536`, where all of it goes back to the machine, in two steps whose times are not used.

    python benchmarks/peers.py [--images 2|16] [--tasks 8] [--steps 5] [--small] [--only ARM ...] [--plot FILE]
    python benchmarks/peers.py --peaks 5 [--images 16]
    python benchmarks/peers.py --limit-tasks [GiB]

By default a peak moves from process to process. `--peaks` takes turns with FusionBench and ours, and takes medians.

`--limit-tasks` finds the largest T at which FusionBench's process stays within so much memory, or within what the
machine has left if that is less: reckoned from two small T, then run there, and with one task more.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from arms import MEMORY, PEER, WORKER, Clock, Measured, TooLarge, assert_same, compared, measured
from common import available, company, show
from merges import Summed, Vision, merged, run
from torch import Tensor
from vit import INIT, Inputs

from adamerge.loops import Joint
from adamerge.objectives import Entropy
from adamerge.rules import LayerWise
from adamerge.types import TaskInfo, TaskOutput

TOLERANCE = 1e-3  # of the gradient's norm
GIB = 2**30


def ours(inputs: Inputs, clock: Clock, *, order: str = "auto", mode: str = "leaf", narrow: bool = False) -> None:
    model = merged(inputs, lambda vectors: LayerWise(vectors, init=INIT), apply_mode=mode, narrow=narrow)
    clock.first_gradient({"coefficients": model.rule.raw_TG})
    batches = {task: {"pixels": pixels} for task, pixels in inputs.batches.items()}
    run(Summed(model, loop=Joint(order=order)), batches, clock, narrow=narrow)


def plain(inputs: Inputs, clock: Clock, *, concatenated: bool = False, narrow: bool = False) -> None:
    backbone, entropy = Vision(inputs), Entropy()
    net, heads = backbone.build(), {task: backbone.head(TaskInfo(task)) for task in inputs.tasks}

    def loss(task: str, features_BD: Tensor) -> Tensor:
        term = entropy(TaskOutput(task, features_BD, heads[task](features_BD)), {})["entropy"]
        return term.sum / term.count

    def features(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return backbone.features(net, {"pixels": pixels}).float()

    for _ in range(clock.steps):
        clock.mark()
        net.zero_grad()
        if concatenated:
            parts = features(torch.cat(list(inputs.batches.values()))).split(inputs.options["images"])
            torch.stack([loss(task, part) for task, part in zip(inputs.tasks, parts, strict=True)]).sum().backward()
        else:
            for task, pixels in inputs.batches.items():
                loss(task, features(pixels)).backward()


Arm = Callable[[Inputs, Clock], None]
PLAIN: dict[str, Arm] = {
    "plain, task by task": plain,
    "plain, concatenated": partial(plain, concatenated=True),
}
OURS: dict[str, Arm] = {
    "adamerge": ours,
    "adamerge, task by task": partial(ours, order="per_task"),
    "adamerge, concatenated": partial(ours, order="concatenated"),
    "adamerge, swap": partial(ours, mode="swap"),
}
NARROW: dict[str, Arm] = {
    "plain, bf16-mixed": partial(plain, narrow=True),
    "adamerge, bf16-mixed": partial(ours, narrow=True),
}
ARMS = PLAIN | OURS | NARROW


def compare(inputs: Inputs, steps: int, arms: Sequence[str], plot: Path | None) -> None:
    """The table of these arms."""
    found = {arm: compared(__file__, arm, inputs.folder, steps) for arm in arms}
    peer, _ = found["FusionBench"] = compared(WORKER, "layer_wise", inputs.folder, steps, peer=True)
    apart = max(assert_same(found[arm][0].gradients, peer.gradients, TOLERANCE) for arm in OURS if arm in found)
    best = min(found[arm][0].step for arm in PLAIN if arm in found)
    rows = []
    for arm, (each, kept) in found.items():
        times = [f"{each.step:.3f}", f"{each.step / best:.2f}", f"{peer.step / each.step:.2f}"]
        rows.append([arm, *times, *each.memory(), f"{kept / 1e6:,.0f}"])
    show(
        f"A layer-wise AdaMerging step: adamerge, {PEER}, and a plain forward and backward",
        f"{inputs.describe()}; medians of {steps} steps; the first gradients of the coefficients differ by "
        f"{apart:.0e} of their norm at most (asserted: {TOLERANCE:.0e}){company()}",
        ["step", "seconds", "to the best plain", "FusionBench's over it", *MEMORY, "MB at the peak by default"],
        rows,
    )
    if plot is not None:
        draw(inputs, {arm: each for arm, (each, _) in found.items()}, plot)


def draw(inputs: Inputs, found: Mapping[str, Measured], file: Path) -> None:
    """A bar for each arm's step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.32 * len(found)), layout="constrained")
    axes = figure.subplots()
    kinds = {"plain": "#888888", "adamerge": "#0072b2", "FusionBench": "#d55e00"}
    colors = [kinds[arm.partition(",")[0]] for arm in found]
    axes.bar_label(axes.barh(list(found), [each.step for each in found.values()], color=colors), fmt=" %.2f")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=f"seconds per step of {len(inputs.tasks)} tasks, {inputs.options['images']} images each")
    figure.savefig(file, dpi=120)


def peaks(inputs: Inputs, number: int) -> None:
    """The table of both peaks, of so many processes each, as processes are by default."""
    found: dict[str, list[int]] = {"FusionBench": [], "adamerge": []}
    for _ in range(number):
        for arm, each in found.items():
            peer = arm == "FusionBench"
            script, name = (WORKER, "layer_wise") if peer else (__file__, arm)
            each.append(measured(script, name, inputs.folder, warm=1, steps=1, peer=peer).peak)
    theirs = median(found["FusionBench"])
    rows = []
    for arm, each in found.items():
        sizes = [f"{size / 1e6:,.0f}" for size in (median(each), min(each), max(each))]
        rows.append([arm, *sizes, f"{median(each) / theirs:.2f}", f"{median(each) / min(found['FusionBench']):.2f}"])
    show(
        f"Peak memory of processes as they are by default: adamerge and {PEER}",
        f"{inputs.describe()}; medians of {number} processes of two steps each{company()}",
        ["process", "MB, median", "least", "most", "to FusionBench's median", "to its least"],
        rows,
    )


def largest(folder: Path, shape: str, gib: float) -> None:
    """The table of the largest T that FusionBench has memory for, and of ours at the same T."""
    one = {"warm": 0, "steps": 5}

    def write(tasks: int) -> Inputs:
        return Inputs.write(folder, shape=shape, tasks=tasks, images=2)

    def peer(tasks: int, limit: int | None = None) -> Measured | None:
        write(tasks)
        try:
            return measured(WORKER, "layer_wise", folder, peer=True, limit=limit, **one)
        except TooLarge:
            return None

    limit = int(min(gib * GIB, available() - GIB / 2))
    few, more = (peer(tasks).peak for tasks in (2, 6))
    reckoned = {size: 2 + int((size - few) * 4 / (more - few)) for size in (limit, int(gib * GIB))}
    tasks, found = reckoned[limit], {}
    while not (found.get(tasks) and tasks + 1 in found):
        tasks += bool(found.get(tasks))
        found[tasks] = peer(tasks, limit)
        tasks -= found[tasks] is None
    inputs, theirs = write(tasks), found[tasks]
    mine = measured(__file__, "adamerge", folder, **one)
    apart = assert_same(mine.gradients, theirs.gradients, TOLERANCE)
    rows = [
        [name, f"{each.step:.2f}", f"{theirs.step / each.step:.1f}", *each.memory()]
        for name, each in (("FusionBench", theirs), ("adamerge", mine))
    ]
    show(
        f"The most tasks that {PEER} has memory for within {limit / GIB:.1f} GiB: {tasks}; {tasks + 1} were too many",
        f"{inputs.describe()}; medians of 5 steps; reckoned from 2 and 6 "
        f"tasks, {(more - few) / 4e6:.0f} MB each: {reckoned[limit]}, and {reckoned[int(gib * GIB)]} within {gib:g} "
        f"GiB; the gradients differ by {apart:.0e} of their norm{company()}",
        [f"step of {tasks} tasks", "seconds", "FusionBench's over it", *MEMORY],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="per task")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="that are counted; one is run before them")
    parser.add_argument("--small", action="store_true", help="a small tower, to see that all works")
    parser.add_argument("--only", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help="these arms")
    parser.add_argument("--plot", type=Path, help="Also draw the steps' times")
    parser.add_argument("--peaks", type=int, help="compare the peaks of so many processes")
    parser.add_argument("--limit-tasks", type=float, nargs="?", const=24.0, metavar="GIB")
    asked = parser.parse_args()
    if not (set(asked.only) & set(PLAIN) and set(asked.only) & set(OURS)):
        parser.error(f"--only needs one of {', '.join(PLAIN)} and one of {', '.join(OURS)} to compare")
    shape = "small" if asked.small else "ViT-B/32"
    with tempfile.TemporaryDirectory() as name:
        if asked.limit_tasks:
            largest(Path(name), shape, asked.limit_tasks)
        else:
            inputs = Inputs.write(Path(name), shape=shape, tasks=asked.tasks, images=asked.images)
            if asked.peaks:
                peaks(inputs, asked.peaks)
            else:
                compare(inputs, asked.steps, asked.only, asked.plot)


if __name__ == "__main__":
    Clock.run(ARMS, sys.argv[1:]) if sys.argv[1:2] and sys.argv[1] in ARMS else main()
