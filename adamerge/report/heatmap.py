"""Coefficients as a picture: a row per task, a column per group of tensors, block by block.

T tasks · G groups of tensors · K kinds of tensors that blocks share.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamerge.report.canvas import (
    DIVERGING,
    FAINT,
    INK,
    LARGE,
    NORMAL,
    SMALL,
    inch_grid,
    ink_on,
    panel,
    plain,
    sheet,
    two_digits,
    widest,
)
from adamerge.report.columns import (
    GAP,
    VALUE_CELL,
    Segment,
    cell_width,
    place_columns,
    runs_of,
    segments_of,
    shared_kinds,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEGEND = 1.0  # inches, for the scale


def coefficient_heatmap(coef_TG: Tensor, tasks: Sequence[str], groups: Sequence[str]) -> "Figure":
    """Coefficients [T, G] of a merge, and below their means over the blocks for each kind of tensor.

    White is zero, where an expert is not used; red is negative. One coefficient far above the others does not wash
    them out: the scale then ends at the 99th percentile, and its pointed ends say so.

    Args:
        coef_TG: Coefficients, dimensionless.
        tasks: The T row names.
        groups: The G group names, as `ParamSpace.group_names` has them.
    """
    coef_TG = coef_TG.detach().to("cpu", torch.float64)
    segments = segments_of(groups)
    edges = place_columns(segments, cell_width(len(groups)))
    kinds = shared_kinds(segments)
    row = 0.26 if len(tasks) <= 12 else 0.2
    height, width, width_K = row * len(tasks), edges[-1][-1], VALUE_CELL * (len(kinds) + 1) + GAP
    left, below = 0.3 + widest(tasks, NORMAL), 0.12 + _depth(segments, edges)
    depth_K = 0.12 + widest(list(kinds), SMALL)
    top_K = 0.4 + max(height + below, 1.4) + 0.3
    total = 0.4 + max(height + below, 1.4) + ((0.3 + height + depth_K) if kinds else 0) + 0.1
    figure = sheet(left + max(width + _LEGEND, (width_K if kinds else 0) + 0.2, 3.0), total)
    limit, beyond = _limit(coef_TG)

    axes = panel(figure, left, 0.4, width, height)
    title = "Coefficient per task and group of tensors" if len(groups) > 1 else "Coefficient per task"
    _frame(axes, title, tasks, width, height, row)
    for segment, edge in zip(segments, edges, strict=True):
        _cells(axes, coef_TG[:, list(segment.columns)], edge, row, limit)
    _name_segments(axes, segments, edges, height)
    scale = panel(figure, left + width + 0.15, 0.4, 0.12, max(min(height, 2.2), 1.2))
    figure.colorbar(axes.collections[0], cax=scale, extend="both" if beyond else "neither")
    scale.set_ylabel("coefficient", fontsize=NORMAL, color=INK)
    scale.tick_params(labelsize=SMALL)

    if kinds:
        axes = panel(figure, left, top_K, width_K, height)
        _frame(axes, "Mean over blocks per kind of tensor, and over all groups", tasks, width_K, height, row)
        mean_TK = torch.stack([coef_TG[:, columns].mean(1) for columns in kinds.values()], 1)
        steps = [VALUE_CELL * step for step in range(len(kinds) + 1)]
        _cells(axes, mean_TK, steps, row, limit)
        _cells(axes, coef_TG.mean(1, keepdim=True), [steps[-1] + GAP, width_K], row, limit)
        for start, kind in zip([*steps[:-1], steps[-1] + GAP], [*kinds, "all groups"], strict=True):
            _upright(axes, start + VALUE_CELL / 2, height, kind)
    return figure


def _depth(segments: Sequence[Segment], edges: Sequence[Sequence[float]]) -> float:
    """Inches that the names below the panel need."""
    upright = [segments[i].label for _, run, fits in runs_of(segments, edges) if not fits for i in run]
    return max(0.4, widest(upright, SMALL))


def _name_segments(axes: "Axes", segments: Sequence[Segment], edges: Sequence[Sequence[float]], height: float) -> None:
    """Block numbers over their container's name where it fits; other names upright."""
    for container, run, fits in runs_of(segments, edges):
        for index in run:
            middle = (edges[index][0] + edges[index][-1]) / 2
            if fits:
                number = plain(segments[index].number)
                axes.text(middle, height + 0.05, number, ha="center", va="top", fontsize=SMALL, color=INK)
            else:
                _upright(axes, middle, height, segments[index].label)
        if fits:
            ends, line = (edges[run[0]][0], edges[run[-1]][-1]), height + 0.2
            axes.plot(ends, (line, line), color=FAINT, linewidth=0.6, clip_on=False)
            axes.text(sum(ends) / 2, line + 0.03, plain(container), ha="center", va="top", fontsize=SMALL, color=INK)


def _upright(axes: "Axes", middle: float, height: float, text: str) -> None:
    axes.text(middle, height + 0.05, plain(text), ha="center", va="top", rotation=90, fontsize=SMALL, color=INK)


def _frame(axes: "Axes", title: str, tasks: Sequence[str], width: float, height: float, row: float) -> None:
    inch_grid(axes, width, height)
    axes.set_title(title, loc="left", fontsize=LARGE, color=INK)
    axes.set_yticks([row * (place + 0.5) for place in range(len(tasks))], [plain(task) for task in tasks])


def _cells(axes: "Axes", value_TC: Tensor, edges: Sequence[float], row: float, limit: float) -> None:
    """A block of coloured cells; with their values where they fit."""
    rows = [row * place for place in range(len(value_TC) + 1)]
    line = 0.6 if edges[1] - edges[0] > 0.2 else 0.0
    axes.pcolormesh(
        edges, rows, value_TC.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit, edgecolors="white", linewidth=line
    )
    for edge in rows[1:-1] if not line else ():
        axes.plot((edges[0], edges[-1]), (edge, edge), color="white", linewidth=0.6)
    if edges[1] - edges[0] > 0.99 * VALUE_CELL:
        for place, values in enumerate(value_TC.tolist()):
            for column, value in enumerate(values):
                where, ink = ((edges[column] + edges[column + 1]) / 2, row * (place + 0.5)), ink_on(value, limit)
                axes.text(*where, two_digits(value), ha="center", va="center", fontsize=SMALL, color=ink)


def _limit(coef_TG: Tensor) -> tuple[float, bool]:
    """The largest magnitude that the colours show, and whether some lie well beyond it."""
    size = coef_TG.nan_to_num().abs().flatten()
    largest = float(size.max())
    usual = float(size.sort().values[int(0.99 * (len(size) - 1))])  # torch.quantile has an upper size limit
    beyond = largest > 1.5 * usual > 0
    return max(usual if beyond else largest, 1e-6), beyond
