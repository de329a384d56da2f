"""What the benchmarks share: how they time, and how they say what they measured."""

import ctypes
import gc
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

CONFIGS = Path(__file__).parents[1] / "configs"


def median_seconds(calls: Mapping[str, Callable[[], Any]], *, repeats: int = 7) -> dict[str, float]:
    """Median seconds per call after one warm-up; the calls take turns, so that a slow spell hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: median(each[1:]) for name, each in times.items()}


def company() -> str:
    """How busy other processes have kept the machine since the start: timings mean little unless it is near nothing."""
    if _START is None:
        return ""
    wall, own, busy = (now - then for now, then in zip(_times(), _START, strict=True))
    return f"; other processes took {max(0.0, busy - own) / wall / (os.cpu_count() or 1):.0%} of the machine meanwhile"


def resident(field: str, process: int | str = "self") -> int:
    """Bytes that a process holds in memory (`VmRSS`) or has held at the peak (`VmHWM`) (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def available() -> int:
    """Bytes of memory that the machine has left (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def forget_peak() -> None:
    """The peak counts from here. `ru_maxrss` would not do: a process starts with that of the one that started it."""
    Path("/proc/self/clear_refs").write_text("5")


def added_memory(call: Callable[[], Any], *, repeats: int = 3) -> int:
    """Bytes that the peak of a few calls adds to what stood before them (Linux)."""
    gc.collect()
    before = resident("VmRSS")
    forget_peak()
    for _ in range(repeats):
        call()
    return resident("VmHWM") - before


def show(title: str, settings: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table in Markdown, with the settings and the machine above it."""
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_processor()}"
    table = Table(box=box.MARKDOWN, show_edge=True)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=200, highlight=False, color_system=None)
    console.print(f"{title}\n{settings}\n{machine}", markup=False)
    console.print(table)


def keep_freed_memory() -> None:
    """Let glibc use freed memory again instead of handing it back; call it before anything large is made."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation of its own pages
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def quiet() -> None:
    """Keep Lightning's notices out of the output."""
    import lightning.pytorch  # noqa: F401 - it sets its own level when it is first imported

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _times() -> tuple[float, float, float]:
    """Seconds: the clock's, the CPU time of this process and its children, and that of everybody."""
    ticks = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk
    return time.perf_counter(), sum(os.times()[:4]), busy


_START = _times() if Path("/proc/stat").exists() else None
