"""Heat maps: named values arranged by layer and module, with a colour for each.

``model.layers.7.mlp.down_proj.weight`` is row 7, column ``mlp.down_proj`` of the map ``model.layers``. Modules that
differ only in further numbers, such as experts, share a column: ``block_sparse_moe.experts.*.w1``.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_UNNUMBERED_ROWS = 48
_SHADES = 32

Values = Mapping[tuple[str, str], Sequence[float]]
"""(row, column) -> the values that share the cell."""


class ModulePlace(NamedTuple):
    """Where a module is in the heat maps.

    Attributes:
        stack: prefix of the layer number, such as ``model.layers``; empty for a name without a number.
        row: first number in the name; the whole name if it has none.
        column: rest of the name, with ``*`` for further numbers; empty for a name without a number.
    """

    stack: str
    row: str
    column: str


@dataclass(frozen=True)
class HeatCell:
    """A cell: the text in it, its name and value in words, and the colours of its ground and its text."""

    shown: str
    title: str
    fill: str
    ink: str


@dataclass(frozen=True)
class HeatRow:
    """A row: its label, and a cell or None for each column."""

    label: str
    cells: tuple[HeatCell | None, ...]


@dataclass(frozen=True)
class HeatMap:
    """One stack of layers.

    Attributes:
        stack: name of the stack whose layers are the rows; empty for names without a layer, which have one row each.
        columns: labels of the columns, sorted; one empty label for names without a layer.
        rows: layers ascending, or names with the largest values first.
    """

    stack: str
    columns: tuple[str, ...]
    rows: tuple[HeatRow, ...]


@dataclass(frozen=True)
class HeatFigure:
    """The maps of one measure, one per stack, that of names without a layer last.

    Attributes:
        maps: the maps; empty without values.
        marks: values of the first, the middle and the last colour as text; empty if all values are the same.
        shades: the colours, from the lowest value to the highest.
        left_out: number of names without a layer that are not shown for lack of room.
    """

    maps: tuple[HeatMap, ...] = ()
    marks: tuple[str, ...] = ()
    shades: tuple[str, ...] = ()
    left_out: int = 0

    @property
    def has_gaps(self) -> bool:
        """Whether a layer lacks a module that another has."""
        return any(cell is None for drawn in self.maps for row in drawn.rows for cell in row.cells)


def place(name: str) -> ModulePlace:
    """Return the place of a dotted name; a final ``.weight`` is dropped."""
    parts = name.removesuffix(".weight").split(".")
    first = next((position for position, part in enumerate(parts) if _is_number(part)), None)
    if first is None:
        return ModulePlace("", ".".join(parts), "")
    return ModulePlace(
        ".".join(parts[:first]) or "layers", str(int(parts[first])), starred(".".join(parts[first + 1 :])) or "weight"
    )


def starred(name: str) -> str:
    """Replace the numbers in a dotted name by ``*``, so that a module has the same name in every layer."""
    return ".".join("*" if _is_number(part) else part for part in name.split("."))


def heat_figure(
    values: Mapping[str, float], low: float | None = None, high: float | None = None, *, signed: bool = False
) -> HeatFigure:
    """Arrange values in heat maps; a cell that several names share shows their mean.

    Args:
        values: dotted name -> finite value.
        low: value of the first colour; None for the smallest one shown.
        high: value of the last colour; None for the largest one shown.
        signed: values such as cosines: in two hues that are pale in the middle, instead of from dark to bright.
    """
    if not values:
        return HeatFigure()
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, to_hex

    stacks: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, value in values.items():
        where = place(name)
        stacks[where.stack][where.row, where.column].append(value)
    rows = {stack: _rows(stack, cells) for stack, cells in stacks.items()}
    means = [_mean(found) for stack in stacks for (row, _), found in stacks[stack].items() if row in rows[stack]]
    low, high = min(means) if low is None else low, max(means) if high is None else high
    colours, scale = colormaps["RdBu" if signed else "viridis"].resampled(_SHADES), Normalize(low, high)
    show = _signed if signed else three_digits

    def cell(stack: str, row: str, column: str) -> HeatCell | None:
        found = stacks[stack].get((row, column))
        if found is None:
            return None
        mean = _mean(found)
        several = f" (mean of {len(found)}, at most {show(max(found))})" if len(found) > 1 else ""
        where = f"{stack}.{row} {column}" if stack else row
        red, green, blue, _ = colour = colours(scale(mean))
        ink = "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.42 else "#000"
        return HeatCell(show(mean), f"{where}: {show(mean)}{several}", to_hex(colour), ink)

    maps = []
    for stack in sorted(stacks, key=lambda stack: (stack == "", stack)):
        columns = tuple(sorted({column for _, column in stacks[stack]}))
        drawn = (HeatRow(row, tuple(cell(stack, row, column) for column in columns)) for row in rows[stack])
        maps.append(HeatMap(stack, columns, tuple(drawn)))
    return HeatFigure(
        tuple(maps),
        tuple(show(mark) for mark in (low, (low + high) / 2, high)) if low < high else (),
        tuple(to_hex(colours(shade)) for shade in range(_SHADES)),
        max(0, len(stacks.get("", ())) - _UNNUMBERED_ROWS),
    )


def three_digits(value: float) -> str:
    """Format a value to fit a cell: 141, 12.0, 0.521, 2e-05."""
    return f"{value:.0e}" if 0 < abs(value) < 0.01 else f"{value:#.3g}".rstrip(".")


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


def _rows(stack: str, cells: Values) -> list[str]:
    if stack:
        return sorted({row for row, _ in cells}, key=int)
    return sorted((row for row, _ in cells), key=lambda row: (-max(cells[row, ""]), row))[:_UNNUMBERED_ROWS]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10
