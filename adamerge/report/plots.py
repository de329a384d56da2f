"""The plots of a run as files."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adamerge.files import atomic_file
from adamerge.report.accuracy import accuracy_bars
from adamerge.report.cosine import cosine_heatmap, cosine_matrix
from adamerge.report.curves import training_curves
from adamerge.report.heatmap import coefficient_heatmap
from adamerge.task_vectors import TaskVectors
from adamerge.types import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from adamerge.merged import MergedModel

log = logging.getLogger("adamerge")
DPI = 150


def write_plots(
    folder: Path,
    *,
    model: "MergedModel | None" = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    metrics: Path | None = None,
    vectors: TaskVectors | None = None,
) -> list[Path]:
    """Draw what there is into `folder`; each file is old or new, never half-written.

    Args:
        folder: Made if need be.
        model: For `coefficients.png`; a rule without coefficients [T, G] gets none.
        scores: For `accuracy.png`: accuracy in [0, 1] per row and task, this merge last.
        metrics: For `curves.png`: the run's metrics.csv; a file that holds no loss yet gives none.
        vectors: For `cosine.png`; a single task gives none.

    Returns:
        The files written.

    Raises:
        InputError: No space left on the disk.
    """
    written = []
    for name, figure in _figures(model, scores, metrics, vectors):
        with atomic_file(folder / name) as new:
            figure.savefig(new, format="png", dpi=DPI)
        written.append(folder / name)
    return written


def _figures(
    model: "MergedModel | None",
    scores: Mapping[str, Mapping[str, float]] | None,
    metrics: Path | None,
    vectors: TaskVectors | None,
) -> Iterator[tuple[str, "Figure"]]:
    """One at a time, so that only one is in memory."""
    if model is not None and (coef_TG := model.rule.coefficients()) is not None:
        yield "coefficients.png", coefficient_heatmap(coef_TG.detach().cpu(), model.rule.tasks, model.rule.groups)
    if scores:
        yield "accuracy.png", accuracy_bars(scores)
    if metrics is not None:
        try:
            curves = training_curves(metrics)
        except InputError as error:  # nothing was logged yet, which is no reason to lose the other plots
            log.info("%s", error)
        else:
            yield "curves.png", curves
    if vectors is not None and len(vectors.tasks) > 1:
        yield "cosine.png", cosine_heatmap(cosine_matrix(vectors), vectors.tasks)
