"""What a run says: the plan before, the table of scores after."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adamerge.evaluation import Scores


def score_table(scores: Mapping[str, Scores], *, title: str = "Accuracy in %") -> str:
    """A row per merge and a column per task, with the mean where all tasks were scored; the experts share one row."""
    experts = {task: value for row, each in scores.items() if row.startswith("expert ") for task, value in each.items()}
    rows = {row: each for row, each in scores.items() if not row.startswith("expert ")}
    if experts:
        last = list(rows)[-1]
        rows = {**{row: each for row, each in rows.items() if row != last}, "experts": experts, last: rows[last]}
    tasks = list(dict.fromkeys(task for each in rows.values() for task in each))
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in (*tasks, "mean"):
        table.add_column(name, justify="right")
    for row, each in rows.items():
        cells = [f"{100 * each[task]:.1f}" if task in each else "–" for task in tasks]
        table.add_row(row, *cells, f"{100 * mean(each):.1f}", style="bold" if row == list(rows)[-1] else "")
    return rendered(table)


def gain(scores: Mapping[str, Scores]) -> str:
    """How the last row stands to the best of the merges that needed no training, in points of mean accuracy."""
    *before, last = scores
    rivals = {row: mean(scores[row]) for row in before if not row.startswith("expert ")}
    if not rivals:
        return f"{last}: {100 * mean(scores[last]):.1f}"
    best = max(rivals, key=lambda row: rivals[row])
    points = 100 * (mean(scores[last]) - rivals[best])
    return f"{last}: {abs(points):.1f} points {'above' if points >= 0 else 'below'} the best without training ({best})"


def mean(scores: Scores) -> float:
    """The plain mean over tasks."""
    return sum(scores.values()) / max(1, len(scores))


def rendered(table: Table) -> str:
    """A rich table as text without colours, wide enough for all columns."""
    console = Console(file=StringIO(), width=max(80, 14 * (len(table.columns) + 1)), color_system=None)
    console.print(table)
    return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]


def shown(path: Path) -> str:
    """A path as a person at this working directory would write it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def gigabytes(count: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
