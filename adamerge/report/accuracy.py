"""The table of scores as a picture."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adamerge.report.canvas import INK, LARGE, NORMAL, SMALL, open_frame, panel, plain, sheet, text_width, widest
from adamerge.report.tables import mean, with_experts_joined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAST = "#d55e00"
_BEFORE = ("#d9d9d9", "#bcd2e8", "#7fa8d1", "#3b6ea5", "#7a68a6", "#8fbf9f", "#4d8b6a", "#b79c7d")


def accuracy_bars(scores: Mapping[str, Mapping[str, float]]) -> "Figure":
    """A group of bars per task and one for the mean; the experts as one hollow series, the last row in orange.

    Args:
        scores: Accuracy in [0, 1] per row of the table and task; the last row is the one to stress.
    """
    rows = with_experts_joined({row: dict(each) for row, each in scores.items()})
    tasks = list(dict.fromkeys(task for each in rows.values() for task in each))
    bar = max(0.125, min(0.16, 14 / ((len(tasks) + 1) * (len(rows) + 1.5))))  # inches
    pitch = max(0.5, bar * (len(rows) + 1.5))
    slots = [*range(len(tasks)), len(tasks) + 0.25]  # the mean stands apart
    width, height = pitch * (slots[-1] + 1), 2.6
    names = [*tasks, "mean"]
    lean = widest(names, NORMAL) > pitch - 0.08
    below = (0.25 + 0.5 * widest(names, NORMAL)) if lean else 0.3
    left = max(0.65, 0.87 * text_width(names[0], NORMAL) - pitch / 2 + 0.1) if lean else 0.65
    legend = _legend_rows(list(rows), width)
    top = 0.4 + 0.2 * legend[0]
    figure = sheet(left + width + 0.15, top + height + below)
    axes = panel(figure, left, top, width, height)
    open_frame(axes)

    for place, (row, each) in enumerate(rows.items()):
        last, hollow = place == len(rows) - 1, row == "experts"
        values = [each.get(task) for task in tasks] + [mean(dict(each))]
        found = [(slot, 100 * value) for slot, value in zip(slots, values, strict=True) if value is not None]
        bars = axes.bar(
            [pitch * (slot + 0.5) + bar * (place - (len(rows) - 1) / 2) for slot, _ in found],
            [value for _, value in found],
            width=0.92 * bar,
            label=row,
            color="white" if hollow else _LAST if last else _BEFORE[place % len(_BEFORE)],
            edgecolor="#777777" if hollow else "none",
            linewidth=0.7,
        )
        for patch, (slot, value) in zip(bars, found, strict=True):
            if last or slot == slots[-1]:
                axes.annotate(
                    f"{value:.1f}",
                    (patch.get_x() + patch.get_width() / 2, value),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    rotation=90,
                    fontsize=SMALL,
                    fontweight="bold" if last else "normal",
                    color=_LAST if last else INK,
                )
    axes.set(xlim=(0, width), ylim=(0, 112), yticks=range(0, 101, 20))
    axes.set_ylabel("accuracy in %", fontsize=NORMAL, color=INK)
    axes.tick_params(axis="x", length=0)
    axes.axvline(pitch * (len(tasks) + 0.125), color="#bbbbbb", linewidth=0.6)
    tilt = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if lean else {}
    axes.set_xticks([pitch * (slot + 0.5) for slot in slots], [plain(name) for name in names], **tilt)  # type: ignore[arg-type]
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=legend[1], frameon=False, fontsize=NORMAL, borderaxespad=0.2,
        handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
    figure.text(left / figure.get_figwidth(), 1 - 0.08 / figure.get_figheight(), "Accuracy per task", va="top",
                fontsize=LARGE, color=INK)  # fmt: skip
    return figure


def _legend_rows(names: Sequence[str], width: float) -> tuple[int, int]:
    """(rows, columns) of a legend no wider than so many inches."""
    if sum(text_width(name, NORMAL) + 0.42 for name in names) <= width:
        return 1, len(names)
    columns = max(1, min(len(names), int(width / (widest(names, NORMAL) + 0.42))))
    return -(-len(names) // columns), columns
