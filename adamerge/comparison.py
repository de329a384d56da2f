"""The table of a comparison: merges without training, then a row for each recipe; at a terminal and on disk."""

import csv
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from adamerge.files import atomic_file
from adamerge.report import mean, rendered, shown

BASELINES = ("base", "average", "task arithmetic", "TIES")
EXPERTS = "experts, each on its own"
_COST = {  # column on disk -> (column at a terminal, how a number is written)
    "steps": ("steps", "{:.0f}"),
    "seconds": ("seconds", "{:.1f}"),
    "peak_memory_gb": ("memory in GB", "{:.2f}"),
    "learnables": ("learnables", "{:.0f}"),
    "folds": ("folds", "{}"),
}

Figures = dict[str, float | str | None]


@dataclass(frozen=True)
class Ran:
    """What the table needs of one finished run; kept in its done-marker.

    Attributes:
        dir: The run's directory.
        scores: Accuracy in [0, 1] per task.
        baselines: The same per merge without training; None where they were not asked for.
        steps: Optimiser steps; None, like all below but the last two, where the run does not say.
        seconds: Of training alone.
        peak_memory: Bytes.
        learnables: How many numbers were trained.
        folds: Whether the merge becomes one dense model.
        sources: sha256 of the base and each expert.
        versions: Of adamerge and its libraries.
    """

    dir: str
    scores: dict[str, float]
    baselines: dict[str, dict[str, float]] | None
    steps: int | None
    seconds: float | None
    peak_memory: int | None
    learnables: int | None
    folds: bool | None
    sources: dict[str, str]
    versions: dict[str, str]


@dataclass
class Row:
    """One method.

    Attributes:
        name: Of the method.
        scores: Accuracy in [0, 1] per task, for each seed.
        runs: For each seed the run; none for what needs no training.
        seeds: How many runs were asked for.
    """

    name: str
    scores: list[dict[str, float]]
    runs: list[Ran] = field(default_factory=list)
    seeds: int = 0

    def cost(self) -> Figures:
        """What the method takes: means over the seeds, of memory the highest peak."""

        def known(name: str) -> list[Any]:
            return [value for run in self.runs if (value := getattr(run, name)) is not None]

        steps, seconds, folds = map(known, ("steps", "seconds", "folds"))
        lean = [run for run in self.runs if run.baselines is None] or self.runs  # the others scored baselines, too
        memory = [run.peak_memory for run in lean if run.peak_memory is not None]
        return {
            "steps": fmean(steps) if steps else None,
            "seconds": fmean(seconds) if seconds else None,
            "peak_memory_gb": max(memory) / 1e9 if memory else None,
            "learnables": max(known("learnables"), default=None),
            "folds": ("yes" if all(folds) else "no") if folds else None,
        }


@dataclass
class Comparison:
    """What a comparison gives back.

    Attributes:
        rows: The merges without training, then the recipes.
        tasks: In the order of the columns.
        folder: Where `compare.csv` and `compare.md` are.
        title: Over the table at a terminal.
        about: Command, seeds and versions.
    """

    rows: list[Row]
    tasks: tuple[str, ...]
    folder: Path
    title: str
    about: str

    def __str__(self) -> str:
        head, lines = self._texts()
        whole = _table(self.title, head, lines)
        if max(map(len, whole.splitlines())) > shutil.get_terminal_size((120, 24)).columns:
            split = len(head) - len(_COST)
            costs = [[line[0], *line[split:]] for row, line in zip(self.rows, lines, strict=True) if row.seeds]
            accuracy = _table(self.title, head[:split], [line[:split] for line in lines])
            whole = f"{accuracy}\n{_table('Cost', ['', *head[split:]], costs)}"
        return "\n".join([whole, *self._meaning(), f"Written: {', '.join(map(shown, self._files()))}"])

    def figures(self, row: Row) -> Figures:
        """A row in numbers: accuracy in %, and points of it; None for what is not known."""
        means, best = [100 * mean(each) for each in row.scores], self._best()
        return {
            "method": row.name,
            **{f"accuracy/{t}": _percent([s[t] for s in row.scores if t in s]) for t in self.tasks},
            "mean": fmean(means) if means else None,
            "std": stdev(means) if len(means) > 1 else None,
            "gain": fmean(means) - best[1] if means and best and row.seeds else None,
            "seeds": len(row.runs) if row.seeds else None,
            **row.cost(),
        }

    def write(self) -> None:
        """Write `compare.csv` and `compare.md`, each whole.

        Raises:
            InputError: No space left on the disk.
        """
        table, page = self._files()
        figures = list(map(self.figures, self.rows))
        with atomic_file(table) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(figures[0]), lineterminator="\n")
            writer.writeheader()
            for each in figures:
                writer.writerow({key: round(v, 6) if isinstance(v, float) else v for key, v in each.items()})
        head, lines = self._texts()
        marks = ["---", *["---:"] * (len(head) - 1)]
        text = [f"| {' | '.join(line)} |" for line in (list(map(_escaped, line)) for line in (head, marks, *lines))]
        with atomic_file(page) as new:
            new.write_text("\n".join([*text, "", " ".join([*self._meaning(), self.about]), ""]), encoding="utf-8")

    def _files(self) -> tuple[Path, Path]:
        return self.folder / "compare.csv", self.folder / "compare.md"

    def _best(self) -> tuple[str, float] | None:
        """The best merge without training and its mean accuracy in %; None where none was scored."""
        rivals = {row.name: 100 * mean(row.scores[0]) for row in self.rows if not row.seeds and row.name in BASELINES}
        return max(rivals.items(), key=lambda each: each[1]) if rivals else None

    def _meaning(self) -> list[str]:
        best = self._best()
        return [f"Gains are in points over the best without training, {best[0]}."] if best else []

    def _texts(self) -> tuple[list[str], list[list[str]]]:
        """The head and the lines of the table, as a person reads them."""
        head = ["", *self.tasks, "mean", "gain", *(name for name, _ in _COST.values())]
        return head, [self._line(row) for row in self.rows]

    def _line(self, row: Row) -> list[str]:
        found = self.figures(row)

        def text(key: str, form: str) -> str:
            return "–" if found[key] is None else form.format(found[key])

        missing = "" if len(row.runs) == row.seeds else f" ({len(row.runs)} of {row.seeds} seeds)"
        return [
            row.name + missing,
            *(text(f"accuracy/{task}", "{:.1f}") for task in self.tasks),
            text("mean", "{:.1f}") + ("" if found["std"] is None else text("std", " ± {:.1f}")),
            text("gain", "{:+.1f}"),
            *(text(key, form) for key, (_, form) in _COST.items()),
        ]


def _percent(scores: Sequence[float]) -> float | None:
    return 100 * fmean(scores) if scores else None


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _table(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return rendered(table, width=1000)
