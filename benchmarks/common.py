"""What the benchmarks share: how they time, and how they say what they measured."""

import logging
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


def quiet() -> None:
    """Keep Lightning's notices out of the output."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
