"""A run's metrics.csv, read back: the terms of the loss and the validation scores over the steps."""

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

from adamerge.types import InputError

Line = list[tuple[int, float]]  # (step, value)


@dataclass
class Metrics:
    """What a run has logged; a step without a value of its own is absent.

    Attributes:
        loss: The total.
        terms: Per task and term, weighted as they enter the total; `penalty` holds the rule's own.
        accuracy: Validation accuracy per task, in [0, 1].
        mean_accuracy: Its mean over tasks.
    """

    loss: Line = field(default_factory=list)
    terms: dict[str, dict[str, Line]] = field(default_factory=dict)
    accuracy: dict[str, Line] = field(default_factory=dict)
    mean_accuracy: Line = field(default_factory=list)


def read_metrics(path: Path) -> Metrics:
    """Read the file that Lightning's CSVLogger writes.

    Raises:
        InputError: There is no such file, it holds no loss, or a cell is no number.
    """
    if not path.is_file():
        raise InputError(f"There are no curves to draw: {path} does not exist; name the metrics.csv of a run.")
    metrics = Metrics()
    with path.open(newline="", encoding="utf-8") as file:
        try:
            for row in csv.DictReader(file):
                for column, cell in row.items():
                    if cell and (line := _line_of(metrics, column)) is not None:
                        line.append((int(row["step"]), float(cell)))
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise InputError(f"{path} is no metrics.csv of a run, or is damaged ({error!r}).") from error
    if not metrics.loss:
        raise InputError(f"There are no curves to draw: {path} holds no training loss; has the run made a logged step?")
    return metrics


def _line_of(metrics: Metrics, column: str | None) -> Line | None:
    """Where a column's values go; None for columns that no plot shows."""
    if column == "train/loss":
        return metrics.loss
    if column == "val/accuracy":
        return metrics.mean_accuracy
    if term := re.fullmatch(r"train/(.+)/([^/]+)", column or ""):
        return metrics.terms.setdefault(term[1], {}).setdefault(term[2], [])
    if score := re.fullmatch(r"val/(.+)/accuracy", column or ""):
        return metrics.accuracy.setdefault(score[1], [])
    return None
