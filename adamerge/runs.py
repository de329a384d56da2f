"""Runs that are there already: a table of them all, and one told and drawn again."""

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rich.table import Table

from adamerge.artifact import RECORD, open_merge, read_record
from adamerge.reading import open_regular
from adamerge.report import gain, lead, mean, rendered, score_table, shown, write_plots
from adamerge.types import InputError

log = logging.getLogger("adamerge")
CONFIG = "config.yaml"


@dataclass
class Told:
    """The facts about a run that its directory tells.

    Attributes:
        folder: The directory.
        state: `finished`, `stopped early`, or what is wrong.
        method: The rule, after its transforms, and the objectives.
        tasks: How many; 0 where it is not known.
        steps: Optimiser steps made; None where it is not known.
        scores: Accuracy in [0, 1] per row and task.
    """

    folder: Path
    state: str
    method: str = "–"
    tasks: int = 0
    steps: int | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """The merge's mean over tasks, in [0, 1]; None where it was not scored."""
        return mean(self.scores["this merge"]) if "this merge" in self.scores else None

    @property
    def time(self) -> float:
        """When it began, in seconds."""
        return min(file.stat().st_mtime for file in (self.folder / CONFIG, self.folder) if file.exists())


def listing(root: str | Path = "runs", *, sort: str = "time") -> str:
    """A table of all runs below a folder, as text.

    Args:
        root: The folder.
        sort: `time` for the newest first, `score` for the best first.

    Raises:
        InputError: No such folder.
    """
    top = Path(root).expanduser()
    if not top.is_dir():
        raise InputError(f"There is no folder '{root}'; name the `run.root` of your runs.")
    told = [tell(folder) for folder in _folders(top)]
    if not told:
        return f"There are no runs in {shown(top.resolve())} yet."
    if sort == "score":
        told.sort(key=lambda run: -1.0 if run.accuracy is None else run.accuracy, reverse=True)
    else:
        told.sort(key=lambda run: run.time, reverse=True)
    table = Table(title=f"Runs in {shown(top.resolve())}", title_justify="left")
    for name in ("run", "method", "tasks", "steps", "mean accuracy in %", "gain in points", "state"):
        table.add_column(name, justify="left" if name in ("run", "method", "state") else "right", no_wrap=True)
    for run in told:
        table.add_row(str(run.folder.relative_to(top)), *_cells(run))
    return rendered(table, width=1000)


def _cells(run: Told) -> list[str]:
    ahead = lead(run.scores) if run.accuracy is not None else None
    return [
        run.method,
        str(run.tasks or "–"),
        "–" if run.steps is None else str(run.steps),
        "–" if run.accuracy is None else f"{100 * run.accuracy:.1f}",
        "–" if ahead is None else f"{ahead[0]:+.1f} ({ahead[1]})",
        run.state,
    ]


def _folders(top: Path) -> Iterator[Path]:
    """The directories of runs at or below `top`, in order; nothing inside a run is one."""
    if (top / CONFIG).is_file() or (top / "merge" / RECORD).is_file():
        yield top
        return
    for folder in sorted(top.iterdir()):
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith("."):
            yield from _folders(folder)


def tell(folder: Path) -> Told:
    """Read the facts about a run from its directory; damage is told, not raised."""
    if not (folder / "merge").exists():
        return Told(folder, "no merge yet: running or killed", steps=_logged_steps(folder))
    try:
        _, record = read_record(folder)
        return _told(folder, record)
    except InputError as error:
        log.debug("%s", error)
        return Told(folder, "damaged", steps=_logged_steps(folder))


def _told(folder: Path, record: dict[str, Any]) -> Told:
    parts = [*record["transforms"], record["rule"], *record["task_modules"]]
    objectives = " + ".join(dict.fromkeys(map(_name, record.get("objectives") or ())))
    scores = {
        str(row): {str(t): float(v) for t, v in each.items()} for row, each in (record.get("scores") or {}).items()
    }
    over = record.get("finished", "this merge" in scores)
    steps = record.get("steps")
    return Told(
        folder,
        "finished" if over else "stopped early",
        ", ".join(map(_name, parts)) + (f" / {objectives}" if objectives else ""),
        len(record["classes"]),
        int(steps) if steps is not None else _logged_steps(folder),
        scores,
    )


def _name(part: dict[str, Any] | str) -> str:
    return str(part["class_path"] if isinstance(part, dict) else part).rpartition(".")[2]


def _logged_steps(folder: Path) -> int | None:
    """The last step in metrics.csv; None where nothing was logged."""
    try:
        with open_regular(folder / "metrics.csv") as raw, TextIOWrapper(raw, encoding="utf-8", newline="") as file:
            return max((int(row["step"]) + 1 for row in csv.DictReader(file) if row.get("train/loss")), default=None)
    except (OSError, KeyError, ValueError, TypeError, csv.Error):
        return None


def redraw(run: str | Path, *, trust: bool = False) -> str:
    """Draw a run's plots again and give its table as text; needs no data.

    Args:
        run: The run's directory.
        trust: Also build classes from outside adamerge that the merge's record names, for its coefficients.

    Raises:
        InputError: No run.
    """
    folder, record = read_record(run)
    home, scores = folder.parent, record.get("scores") or {}
    try:
        model = open_merge(folder, trust=trust)
    except InputError as error:
        log.warning("Coefficients and task vectors are not drawn again: %s", error)
        model = None
    metrics = home / "metrics.csv"
    drawn = write_plots(
        home / "plots",
        model=model,
        scores=scores,
        metrics=metrics if metrics.exists() else None,
        vectors=model.vectors if model else None,
    )
    tasks = list(record["classes"])
    table = f"{score_table(scores, tasks=tasks)}\n{gain(scores)}\n" if scores else "Nothing was scored.\n"
    return f"{table}Drawn: {', '.join(shown(path) for path in drawn) or 'nothing'}"
