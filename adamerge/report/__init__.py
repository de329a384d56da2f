"""What a run says and shows: the plan before, scores and plots after. matplotlib is imported by the first plot."""

from adamerge.report.accuracy import accuracy_bars
from adamerge.report.cosine import cosine_heatmap, cosine_matrix
from adamerge.report.curves import training_curves
from adamerge.report.heatmap import coefficient_heatmap
from adamerge.report.plots import write_plots
from adamerge.report.tables import duration, gain, gigabytes, lead, mean, rendered, score_table, shown

__all__ = [
    "accuracy_bars",
    "coefficient_heatmap",
    "cosine_heatmap",
    "cosine_matrix",
    "duration",
    "gain",
    "gigabytes",
    "lead",
    "mean",
    "rendered",
    "score_table",
    "shown",
    "training_curves",
    "write_plots",
]
