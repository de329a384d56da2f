"""The table of scores, and numbers as a person reads them."""

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from adamerge.evaluation import Scores  # at run time it brings torchmetrics, and that pyplot


def score_table(
    scores: Mapping[str, "Scores"], *, title: str = "Accuracy in %", tasks: Sequence[str] | None = None
) -> str:
    """A row per merge and a column per task, with the mean over those that were scored; the experts share one row.

    Args:
        scores: Accuracy in [0, 1] per row and task.
        title: Stands above.
        tasks: All there are, those that were not scored too; by default those that were.
    """
    rows = with_experts_joined(scores)
    tasks = list(dict.fromkeys([*(tasks or ()), *(task for each in rows.values() for task in each)]))
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in (*tasks, "mean"):
        table.add_column(name, justify="right")
    for row, each in rows.items():
        cells = [f"{100 * each[task]:.1f}" if task in each else "–" for task in tasks]
        table.add_row(row, *cells, f"{100 * mean(each):.1f}", style="bold" if row == list(rows)[-1] else "")
    return rendered(table)


def with_experts_joined(scores: Mapping[str, "Scores"]) -> dict[str, "Scores"]:
    """The rows with all `expert TASK` as one row `experts`, the last but one."""
    experts = {task: value for row, each in scores.items() if row.startswith("expert ") for task, value in each.items()}
    rows = {row: each for row, each in scores.items() if not row.startswith("expert ")}
    if experts:
        *before, last = rows.items() if rows else [("experts", experts)]
        rows = {**dict(before), "experts": experts, last[0]: last[1]}
    return rows


def gain(scores: Mapping[str, "Scores"]) -> str:
    """Return the last row's lead over the best merge that needed no training, in points of mean accuracy."""
    last, ahead = list(scores)[-1], lead(scores)
    if ahead is None:
        return f"{last}: {100 * mean(scores[last]):.1f}"
    points, best = ahead
    return f"{last}: {abs(points):.1f} points {'above' if points >= 0 else 'below'} the best without training ({best})"


def lead(scores: Mapping[str, "Scores"]) -> tuple[float, str] | None:
    """Points of mean accuracy by which the last row leads the best merge without training, and that row; or None."""
    *before, last = scores
    rivals = {row: mean(scores[row]) for row in before if not row.startswith("expert ")}
    if not rivals:
        return None
    best = max(rivals, key=lambda row: rivals[row])
    return 100 * (mean(scores[last]) - rivals[best]), best


def mean(scores: "Scores") -> float:
    """The plain mean over tasks."""
    return sum(scores.values()) / max(1, len(scores))


def rendered(table: Table, *, width: int | None = None) -> str:
    """A rich table as text without colours or markup, so many characters wide; by default 14 for each column."""
    width = width or max(80, 14 * (len(table.columns) + 1))
    console = Console(file=StringIO(), force_jupyter=False, width=width, color_system=None, markup=False, emoji=False)
    console.print(table)
    text = str(console.file.getvalue())  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()


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
