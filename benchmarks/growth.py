"""Claim: the time of a merge grows linearly with T * P, its memory beside the vectors does not grow with T.

A layer-wise merge over stored task vectors, `combine` of all tensors and `inner` of all, in bf16 on disk (placement
`mmap`), T from 1 to 64. A merge also reads the base and writes one model, whatever T is: the line that is fitted is
a * T * P + b * P. Each point is a process of its own, whose vectors are written tensor by tensor before it measures.
Memory is the most anonymous memory held during the products (RssAnon, looked at every few milliseconds: the system
keeps no peak of it): pages of the mapped files are the system's to drop, and RssFile counts those alone. In it are
Python and its libraries, the base, the merged weights; the last two are 8 bytes for each of the P numbers.

    python benchmarks/growth.py                            # the table
    python benchmarks/growth.py --plot docs/growth.png     # also as a plot
    python benchmarks/growth.py --largest 1e8              # a trial: less of everything
    python benchmarks/growth.py --memory 3e9               # the points in so many bytes, mapped files included

With `--memory` each process runs in a control group of the kernel's, which limits the pages of mapped files as well
(Linux, as root): the vectors of the larger points do not stay in memory, and every pass reads them from the disk.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from common import company, median_seconds, resident, show
from torch import Tensor, nn

from adamerge.rules import LayerWise
from adamerge.space import ParamSpace
from adamerge.task_vectors import TaskVectors

TASKS, FEW, REPEATS = (1, 2, 4, 8, 16, 32, 64), 8, 5
SIDE, NOISE = 1024, 1e-3  # the tensors are square and of about a million numbers; of the experts' weights
LINEAR, FLAT = 1.25, 1.1  # aims: time over the line's, and its inverse, at most; most over least memory at most


class Point(NamedTuple):
    """What one process has measured: numbers in a model, seconds, bytes."""

    tasks: int
    size: int
    combine: float
    inner: float
    memory: int

    @property
    def elements(self) -> int:
        """T * P."""
        return self.tasks * self.size

    @property
    def seconds(self) -> float:
        """Of both products."""
        return self.combine + self.inner

    @property
    def rest(self) -> int:
        """Bytes beside base and merged weights."""
        return self.memory - 8 * self.size


class Line(NamedTuple):
    """Seconds for each of the T * P numbers of the vectors, and for each of the P numbers of a model."""

    vector: float
    weight: float

    def at(self, point: Point) -> float:
        """Seconds of both products."""
        return self.vector * point.elements + self.weight * point.size

    @classmethod
    def through(cls, points: list[Point]) -> "Line":
        """The nearest to what was measured, by relative differences."""
        rows = torch.tensor([[p.elements / p.seconds, p.size / p.seconds] for p in points], dtype=torch.float64)
        return cls(*torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0].tolist())


class Noisy(Mapping[str, Tensor]):
    """A model's tensors, each made when it is asked for: pieces of one long row of random numbers."""

    def __init__(self, shapes: Mapping[str, torch.Size], number: int) -> None:
        self._shapes, self._number, self._places = shapes, number, {name: i for i, name in enumerate(shapes)}
        self._row = torch.randn(2 * SIDE**2, generator=torch.Generator().manual_seed(0))

    def _piece(self, place: int, shape: torch.Size) -> Tensor:
        start = place * 7919 % SIDE**2
        return self._row[start : start + shape.numel()].view(shape)

    def __getitem__(self, name: str) -> Tensor:
        place, shape = self._places[name], self._shapes[name]
        base = self._piece(place, shape)
        return base + NOISE * self._piece(place + 1000 * self._number, shape) if self._number else base

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class MostHeld:
    """The most anonymous memory that the process has held during the block, in `bytes`."""

    def __enter__(self) -> "MostHeld":
        self.bytes, self._done = resident("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, resident("RssAnon"))

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


def measure(tasks: int, size: int) -> Point:
    """One point, in this process."""
    net = nn.Module()
    for place in range(max(1, size // SIDE**2)):
        net.register_parameter(f"weight{place}", nn.Parameter(torch.empty(SIDE, SIDE, device="meta")))
    space = ParamSpace.of(net)
    experts = {f"task{t}": Noisy(space.shapes, 1 + t) for t in range(tasks)}
    vectors = TaskVectors.open(space, Noisy(space.shapes, 0), experts).stored(dtype=torch.bfloat16, placement="mmap")
    experts.clear()
    rule, held = LayerWise(vectors), dict[str, Tensor]()

    def combine() -> None:
        held.clear()
        shared = rule.begin()
        held.update({name: rule.merge(name, vectors.base(name), vectors.deltas(name), shared) for name in space.shapes})

    def inner() -> None:
        rule.zero_grad()
        torch.autograd.backward(list(held.values()), [each.detach() for each in held.values()], retain_graph=True)

    gc.collect()
    with MostHeld() as most:
        seconds = median_seconds({"combine": combine, "inner": inner}, repeats=REPEATS)
    return Point(tasks, space.num_elements, seconds["combine"], seconds["inner"], most.bytes)


def apart(tasks: int, size: int, group: Path | None) -> Point:
    """One point, in a process of its own; `group`: the folder of a control group that it joins."""
    command = [sys.executable, __file__, "--point", str(tasks), str(size)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed goes back, and does not count
    if group is not None:
        command = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh", *command]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Point(**json.loads(found))


@contextmanager
def limited(size: int) -> Iterator[Path]:
    """A control group whose processes have so many bytes of memory, pages of files included."""
    root = Path("/sys/fs/cgroup")
    old = root / "memory"  # the first version of control groups has a tree for each resource
    group = (old if old.is_dir() else root) / f"adamerge-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(size))
        yield group
    finally:
        with suppress(OSError):  # a process of a run that failed may still be ending
            group.rmdir()


def slope(points: list[Point]) -> float:
    """Of log seconds over log T * P."""
    x, y = (torch.tensor(each).log() for each in zip(*((float(p.elements), p.seconds) for p in points), strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def draw(points: list[Point], line: Line, file: Path) -> None:
    """Time and memory over T * P."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    times, memories = figure.subplots(1, 2)
    series = {
        f"P = {points[0].size / 1e6:.1f} M, T = 1 … {TASKS[-1]}": [p for p in points if p.size == points[0].size],
        f"T = {FEW}, P growing": [p for p in points if p.tasks == FEW],
    }
    for marker, (label, unsorted) in zip("os", series.items(), strict=True):
        those = sorted(unsorted, key=lambda p: p.elements)
        elements = [p.elements for p in those]
        (drawn,) = times.loglog(elements, [p.seconds for p in those], marker, label=label)
        times.loglog(elements, [line.at(p) for p in those], "-", color=drawn.get_color(), linewidth=1)
        memories.loglog(elements, [p.memory / 1e6 for p in those], marker + "-", label=label, color=drawn.get_color())
    memories.loglog(elements, [2e-6 * e for e in elements], ":", color="gray", label="the vectors on disk, bf16")
    times.set(title="Time of combine and inner; lines: a·TP + b·P", ylabel="seconds", xlabel="T·P")
    memories.set(title="Peak memory without the mapped files", ylabel="MB", xlabel="T·P")
    for axes in (times, memories):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="How a merge grows with the number and size of the task vectors.")
    parser.add_argument("--largest", type=float, default=2e9, help="T * P of the largest point; 2 bytes of disk each")
    parser.add_argument("--plot", type=Path, help="Also draw it")
    parser.add_argument("--memory", type=float, help="Bytes that a process may hold, mapped files included")
    parser.add_argument("--point", type=int, nargs=2, help="Measure T and P in this process, and print it as JSON")
    options = parser.parse_args()
    if options.point is not None:
        print(json.dumps(measure(*options.point)._asdict()))
        return
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if room < 3 * options.largest:
        parser.error(f"{tempfile.gettempdir()} has {room / 1e9:.1f} GB left; choose a smaller --largest, or TMPDIR")
    size = int(options.largest / TASKS[-1])
    with nullcontext() if options.memory is None else limited(int(options.memory)) as group:
        points = [apart(tasks, size, group) for tasks in TASKS]
        points += [apart(FEW, size * share // FEW, group) for share in (1, 4, 16, 64)]
    line = Line.through(points)
    report(points, line, options.memory)
    if options.plot is not None:
        draw(points, line, options.plot)


def report(points: list[Point], line: Line, memory: float | None) -> None:
    few, rows = [p for p in points if p.tasks == FEW], []
    within = "" if memory is None else f", within {memory / 1e9:g} GB of memory, mapped files included"
    same = [p for p in points if p.size == points[0].size]
    off = max(max(p.seconds / line.at(p), line.at(p) / p.seconds) for p in points)
    flat = max(p.memory for p in same) / min(p.memory for p in same)
    for p in sorted(points, key=lambda point: (point.size, point.tasks)):
        rows.append(
            [
                *(f"{p.tasks}", f"{p.size / 1e6:.1f}", f"{p.elements / 1e6:.0f}", f"{2e-9 * p.elements:.2f}"),
                *(f"{p.combine:.3f}", f"{p.inner:.3f}", f"{1e9 * p.seconds / p.elements:.2f}"),
                *(f"{p.seconds / line.at(p):.2f}", f"{p.memory / 1e6:.0f}", f"{p.rest / 1e6:.0f}"),
            ]
        )
    verdicts = [f"{'at most' if met else 'NOT'} {aim}" for met, aim in ((off <= LINEAR, LINEAR), (flat <= FLAT, FLAT))]
    show(
        "A layer-wise merge (combine, then inner) as the number and the size of the task vectors grow",
        f"bf16 on disk, memory-mapped{within}; medians of {REPEATS}{company()}\n"
        f"time: {1e9 * line.vector:.2f} ns * T * P + {1e9 * line.weight:.2f} ns * P, no point off by more than "
        f"{off:.2f} times ({verdicts[0]}); slope in logarithms {slope(few):.2f} at T = {FEW}\n"
        f"memory at P = {same[0].size / 1e6:.1f} M, T = 1 to {TASKS[-1]}: most over least {flat:.2f} "
        f"({verdicts[1]})",
        [
            "T",
            "P, M",
            "T * P, M",
            "GB on disk",
            "combine s",
            "inner s",
            "ns per element",
            "to the line",
            "MB",
            "MB - 8 P",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
