"""Figures measured in inches, without pyplot: nothing global is touched, and any thread may draw.

matplotlib is imported inside the functions, so that a run that draws nothing never waits for it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL, NORMAL, LARGE = 7.0, 8.0, 9.0  # font sizes in points
LINE = 0.14  # height of a line of small text with its air, in inches
INK, FAINT = "#222222", "#888888"
DIVERGING = "RdBu"  # red below zero, white at zero, blue above
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3294", "#8c510a", "#444444", "#a6cee3")


def sheet(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def panel(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at a place in inches, counted from the figure's left and top."""
    across, down = figure.get_size_inches()
    axes = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    axes.tick_params(labelsize=NORMAL, colors=INK)
    return axes


def inch_grid(axes: "Axes", width: float, height: float) -> None:
    """Let data coordinates be inches from the axes' upper left corner; no frame, no ticks."""
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def open_frame(axes: "Axes") -> None:
    """A frame of two sides with faint horizontal lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


@lru_cache(maxsize=4096)
def text_width(text: str, size: float) -> float:
    """Width in inches of a text of so many points."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), plain(text), size=size).get_extents().x1) / 72 if text.strip() else 0.0


def widest(texts: Sequence[str], size: float) -> float:
    """Width in inches of the widest text."""
    return max((text_width(text, size) for text in texts), default=0.0)


def plain(text: str) -> str:
    """The text as it is, where matplotlib would read dollar signs as mathematics."""
    return text.replace("$", r"\$")


def colors(number: int) -> list[str]:
    """So many colours that can be told apart; the first ten also by the colour-blind."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if number <= len(_SERIES):
        return list(_SERIES[:number])
    return [to_hex(colormaps["turbo"](0.04 + 0.92 * place / (number - 1))) for place in range(number)]


def two_digits(value: float) -> str:
    """A value to two decimals with a proper minus, and none before zero."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def ink_on(value: float, limit: float) -> str:
    """Black or white, whichever reads on the diverging map's colour for a value in [-limit, limit]."""
    return "white" if abs(value) > 0.62 * limit else INK
