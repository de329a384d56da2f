"""Tensor names as columns of a table: which belong to one block, what is the same kind of tensor in every block."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from adamerge.report.canvas import LINE, SMALL, text_width

GAP, VALUE_CELL = 0.07, 0.44  # inches: between segments, of a cell that holds its value


@dataclass(frozen=True)
class Segment:
    """Columns that stand together: those of one block or, outside of the blocks, of one module.

    Attributes:
        label: `transformer.resblocks.3` or `conv1`.
        container: What the block is numbered in, `transformer.resblocks`; empty outside of the blocks.
        number: The block's number in it, as text; empty outside of the blocks.
        columns: Indices of its groups, in [0, G).
        kinds: For each column, its name within the block, such as `attn.in_proj_weight`; empty outside of the blocks.
    """

    label: str
    container: str
    number: str
    columns: tuple[int, ...]
    kinds: tuple[str, ...]


def segments_of(groups: Sequence[str]) -> list[Segment]:
    """Group names cut into segments, in the order in which the network names them first.

    A block is the longest prefix that ends in a number and holds more than one module's own tensors:
    `stages.2.blocks.5` of `stages.2.blocks.5.mlp.fc1.weight`, but not `mlp.0` of `blocks.3.mlp.0.weight`.
    """
    names = _without_common_prefix(groups)
    blocks = {prefix for name in names for prefix, rest in _numbered(name) if not rest or "." in rest}
    found: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for column, name in enumerate(names):
        prefix, kind = max(
            ((prefix, rest) for prefix, rest in _numbered(name) if prefix in blocks),
            key=lambda cut: len(cut[0]),
            default=("", ""),
        )
        container, _, number = prefix.rpartition(".")
        key = (prefix, container, number) if container else (prefix or _module_of(name), "", "")
        found.setdefault(key, []).append((column, kind if container else ""))
    return [Segment(*key, *zip(*cells, strict=True)) for key, cells in found.items()]


def shared_kinds(segments: Sequence[Segment]) -> dict[str, list[int]]:
    """The columns of each kind of tensor that two blocks or more have, in the network's order."""
    kinds: dict[str, list[int]] = {}
    for segment in segments:
        for column, kind in zip(segment.columns, segment.kinds, strict=True):
            if kind:
                kinds.setdefault(kind, []).append(column)
    return {kind: columns for kind, columns in kinds.items() if len(columns) > 1}


def cell_width(number: int) -> float:
    """Inches of one of so many columns: with room for its value, or narrower the more there are."""
    if number * VALUE_CELL <= 7:
        return VALUE_CELL
    return min(0.3, max(13 / number, min(0.05, 100 / number)))


def place_columns(segments: Sequence[Segment], cell: float) -> list[list[float]]:
    """The edges of each segment's columns, in inches; a segment is never narrower than a line of text is high."""
    edges, left = [], 0.0
    for segment in segments:
        number = len(segment.columns)
        step = max(cell, LINE / number, (text_width(segment.number, SMALL) + 0.04) / number)
        edges.append([left + step * column for column in range(number + 1)])
        left = edges[-1][-1] + GAP
    return edges


def runs_of(segments: Sequence[Segment], edges: Sequence[Sequence[float]]) -> list[tuple[str, list[int], bool]]:
    """(container, its segments, whether the container's name fits below them) for neighbours of one container."""
    runs = []
    for container, members in groupby(range(len(segments)), key=lambda index: segments[index].container):
        run = list(members)
        room = edges[run[-1]][-1] - edges[run[0]][0]
        runs.append((container, run, bool(container) and len(run) > 1 and text_width(container, SMALL) <= room))
    return runs


def _numbered(name: str) -> list[tuple[str, str]]:
    """Every cut of a name after a number, as (prefix, rest)."""
    parts = name.split(".")
    ends = [index + 1 for index, part in enumerate(parts) if part.isdigit()]
    return [(".".join(parts[:end]), ".".join(parts[end:])) for end in ends]


def _module_of(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return module if module and leaf in ("weight", "bias") else name


def _without_common_prefix(names: Sequence[str]) -> list[str]:
    """Names without the leading parts that all share, such as `visual.`; a name's last part stays."""
    split = [name.split(".") for name in names]
    same = 0
    while len(split) > 1 and all(len(parts) > same + 1 and parts[same] == split[0][same] for parts in split):
        same += 1
    while same and any(parts[same].isdigit() for parts in split):  # a number says nothing without its container
        same -= 1
    return [".".join(parts[same:]) for parts in split]
