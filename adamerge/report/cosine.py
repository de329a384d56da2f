"""How alike the directions of the task vectors are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamerge.deltas import CHUNK
from adamerge.report.canvas import (
    DIVERGING,
    INK,
    LARGE,
    LINE,
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
from adamerge.task_vectors import TaskVectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def cosine_matrix(vectors: TaskVectors) -> Tensor:
    """Cosines [T, T] between the task vectors over all merged tensors, in float64 on the CPU, in [-1, 1].

    A task vector of zeros has the cosine 0 with all. Sums run in float64; never more than one tensor's vectors are
    held, of which a chunk at a time is widened.
    """
    gram_TT = torch.zeros(len(vectors.tasks), len(vectors.tasks), dtype=torch.float64)
    for name in vectors.space.shapes:
        delta_TN = vectors.deltas(name).dense().reshape(len(vectors.tasks), -1)
        for delta_Tn in delta_TN.split(CHUNK, 1):
            # Apple's device has no float64
            wide_Tn = (delta_Tn.cpu() if delta_Tn.device.type == "mps" else delta_Tn).to(torch.float64)
            gram_TT += (wide_Tn @ wide_Tn.T).cpu()
    norm_T = gram_TT.diagonal().sqrt()
    product_TT = norm_T[:, None] * norm_T
    return torch.where(product_TT > 0, gram_TT / product_TT, 0).clamp(-1, 1)


def cosine_heatmap(cos_TT: Tensor, tasks: Sequence[str]) -> "Figure":
    """The cosines with their values; the colours span the largest between two different tasks.

    Args:
        cos_TT: Symmetric, [T, T], in [-1, 1].
        tasks: The T names.
    """
    cos_TT, number = cos_TT.detach().to("cpu", torch.float64), len(tasks)
    off_TT = cos_TT.masked_fill(torch.eye(number, dtype=torch.bool), torch.nan)
    limit = max(0.05, float(off_TT.nan_to_num().abs().max()))
    cell, aside = 0.4, 0.15 + widest(tasks, NORMAL)
    size = cell * number
    across = widest(tasks, NORMAL) < cell - 0.06
    scale_height = max(1.2, min(size, 2.2))
    figure = sheet(aside + max(size + 1.0, 3.3), 0.4 + max(size + (2 * LINE if across else aside), scale_height) + 0.1)
    axes = panel(figure, aside, 0.4, size, size)
    inch_grid(axes, size, size)
    axes.set_title("Cosines between task vectors", loc="left", fontsize=LARGE, color=INK)
    edges = [cell * place for place in range(number + 1)]
    axes.set_facecolor("#e8e8e8")  # the diagonal, which is 1 and says nothing
    drawn = axes.pcolormesh(
        edges, edges, off_TT.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.6
    )
    for row, values in enumerate(cos_TT.tolist()):
        for column, value in enumerate(values):
            ink = INK if row == column else ink_on(value, limit)
            where = cell * (column + 0.5), cell * (row + 0.5)
            axes.text(*where, two_digits(value), ha="center", va="center", fontsize=SMALL, color=ink)
    middles, names = [cell * (place + 0.5) for place in range(number)], [plain(task) for task in tasks]
    axes.set_yticks(middles, names)
    axes.set_xticks(middles, names, rotation=0 if across else 90)
    scale = panel(figure, aside + size + 0.15, 0.4, 0.12, scale_height)
    figure.colorbar(drawn, cax=scale)
    scale.set_ylabel("cosine", fontsize=NORMAL, color=INK)
    scale.tick_params(labelsize=SMALL)
    return figure
