"""Losses and validation accuracy over the steps of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adamerge.report.canvas import (
    FAINT,
    INK,
    LARGE,
    LINE,
    NORMAL,
    SMALL,
    colors,
    open_frame,
    panel,
    plain,
    sheet,
    widest,
)
from adamerge.report.metrics import Line, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = Literal["-", "--", ":", "-."]
_STYLES: tuple[Style, ...] = ("-", "--", ":", "-.")  # of the terms, in turn
_WIDTH, _HEIGHT = 6.0, 2.6  # of a panel, in inches


def training_curves(metrics: Path) -> "Figure":
    """The total loss and its terms, and in a second panel the validation accuracy if there is any.

    One colour per task, one line style per term. Long series are drawn faint, with their running mean on top.

    Args:
        metrics: The metrics.csv of a run.

    Raises:
        InputError: There is no such file, it holds no loss, or a cell is no number.
    """
    found = read_metrics(metrics)
    tasks = list(dict.fromkeys([*(task for task in found.terms if task != "penalty"), *found.accuracy]))
    color = {**dict(zip(tasks, colors(len(tasks)), strict=True)), "penalty": FAINT}
    kinds = list(dict.fromkeys(kind for task in tasks for kind in found.terms.get(task, {})))
    penalties = list(found.terms.get("penalty", {}))
    style = {kind: _STYLES[place % len(_STYLES)] for place, kind in enumerate([*kinds, *penalties])}

    panels = 2 if found.accuracy or found.mean_accuracy else 1
    keys = [*tasks, *kinds, *(f"penalty {kind}" for kind in penalties), "total"]
    right = 0.75 + widest(keys, SMALL)
    entries = len(tasks) + 1 + (len(kinds) + len(penalties) + 1 if len(kinds) + len(penalties) > 1 else 0)
    height = max(0.2 + panels * (_HEIGHT + 0.75), 0.7 + LINE * entries)
    figure = sheet(0.7 + _WIDTH + right, height)

    axes = panel(figure, 0.7, 0.4, _WIDTH, _HEIGHT)
    window = _window(len(found.loss))
    note = f", running mean over {window} logged steps" if window > 1 else ""
    _frame(axes, f"Loss and its terms{note}", "loss" if len(kinds) > 1 else f"{''.join(kinds)} and total")
    for task, lines in found.terms.items():
        for kind, line in lines.items():
            _draw(axes, line, color[task], style[kind], 1.0, f"train/{task}/{kind}")
    _draw(axes, found.loss, INK, "-", 1.6, "train/loss")
    everything = [found.loss, *(line for lines in found.terms.values() for line in lines.values())]
    if all(value > 0 for line in everything for _, value in line):
        axes.set_yscale("log")
        _plain_numbers(axes)
    _name_lines(axes, tasks, kinds, penalties, color, style)

    if panels > 1:
        axes = panel(figure, 0.7, 0.4 + _HEIGHT + 0.75, _WIDTH, _HEIGHT)
        _frame(axes, "Validation accuracy, its mean in black", "accuracy in %")
        for task, line in found.accuracy.items():
            _draw_points(axes, line, color[task], 1.0, f"val/{task}/accuracy")
        _draw_points(axes, found.mean_accuracy, INK, 1.8, "val/accuracy")
        axes.set_xlim(figure.axes[0].get_xlim())
    axes.set_xlabel("step", fontsize=NORMAL, color=INK)
    return figure


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean over so many values around each, over fewer at the ends."""
    reach = window // 2
    around = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(part) / len(part) for part in around]


def _window(number: int) -> int:
    """How many values one mean takes: one, or an odd number near a twenty-fifth of them where there are many."""
    return 1 if number < 60 else 2 * (number // 50) + 1


def _frame(axes: "Axes", title: str, label: str) -> None:
    open_frame(axes)
    axes.set_title(title, loc="left", fontsize=LARGE, color=INK)
    axes.set_ylabel(label, fontsize=NORMAL, color=INK)


def _plain_numbers(axes: "Axes") -> None:
    """0.1 rather than 10^-1 on a logarithmic axis, and enough marks to read it by."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw(axes: "Axes", line: Line, color: str, style: Style, width: float, gid: str) -> None:
    steps, values = [step for step, _ in line], [value for _, value in line]
    window = _window(len(line))
    mark = "." if len(line) == 1 else ""
    if window == 1:
        axes.plot(steps, values, color=color, linestyle=style, marker=mark, linewidth=width, gid=gid)
    else:
        axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.22, gid=gid)
        axes.plot(steps, running_mean(values, window), color=color, linestyle=style, linewidth=width, gid=f"{gid} mean")


def _draw_points(axes: "Axes", line: Line, color: str, width: float, gid: str) -> None:
    steps, values = [step for step, _ in line], [100 * value for _, value in line]
    axes.plot(steps, values, color=color, marker="o", markersize=2.2 + width, linewidth=width, gid=gid)


def _name_lines(
    axes: "Axes",
    tasks: Sequence[str],
    kinds: Sequence[str],
    penalties: Sequence[str],
    color: dict[str, str],
    style: dict[str, Style],
) -> None:
    """One legend beside the panels: the colours of the tasks, then the styles of the terms where there are several."""
    from matplotlib.lines import Line2D

    rows = [("total", Line2D([], [], color=INK, linewidth=1.8))]
    rows += [(plain(task), Line2D([], [], color=color[task], linewidth=1.4)) for task in tasks]
    if len(kinds) + len(penalties) > 1:
        rows += [("", Line2D([], [], linestyle="none"))]
        rows += [(plain(kind), Line2D([], [], color=INK, linestyle=style[kind], linewidth=1)) for kind in kinds]
        rows += [
            (f"penalty {plain(kind)}", Line2D([], [], color=FAINT, linestyle=style[kind], linewidth=1))
            for kind in penalties
        ]
    axes.legend(
        [line for _, line in rows], [name for name, _ in rows], loc="upper left", bbox_to_anchor=(1.01, 1.02),
        frameon=False, fontsize=SMALL, handlelength=2.2, labelspacing=0.35,
    )  # fmt: skip
