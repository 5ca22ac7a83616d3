"""Mapping of dotted module names to the rows (layers) and columns (modules) of a heat map.

``model.layers.7.mlp.down_proj.weight`` is row 7, column ``mlp.down_proj`` of the grid ``model.layers``. Modules that
differ only in further numbers, such as experts, share a column: ``block_sparse_moe.experts.*.w1``.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

_UNNUMBERED_SHOWN = 48  # maximum number of rows for names without a layer


@dataclass(frozen=True)
class GridPlace:
    """Position of a module's name in the grids.

    Attributes:
        stack: prefix of the layer number, such as ``model.layers``; empty for a name without a number.
        layer: first number in the name; 0 if there is none.
        module: rest of the name, with ``*`` for further numbers; the whole name if it has no number.
    """

    stack: str
    layer: int
    module: str


@dataclass(frozen=True)
class Entry:
    """One cell of a grid.

    Attributes:
        mean: mean of the values that share the cell.
        largest: largest of these values.
        count: number of these values.
    """

    mean: float
    largest: float
    count: int


@dataclass(frozen=True)
class Grid:
    """Values by layer and module.

    Attributes:
        stack: stack whose layers are the rows; empty for names without a layer, which have one row each.
        rows: row labels: layer numbers ascending, or names with the largest values first.
        columns: column labels, sorted; one empty label for names without a layer.
        entries: (row, column) -> entry; cells without a value are absent.
        left_out: number of names without a layer that are not shown for lack of room.
    """

    stack: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    entries: Mapping[tuple[int, int], Entry]
    left_out: int = 0


def place(name: str) -> GridPlace:
    """Return the place of a dotted name; a final ``.weight`` is dropped."""
    parts = name.removesuffix(".weight").split(".")
    numbered = [position for position, part in enumerate(parts) if _is_number(part)]
    if not numbered:
        return GridPlace("", 0, ".".join(parts))
    first = numbered[0]
    module = starred(".".join(parts[first + 1 :])) or "weight"
    return GridPlace(".".join(parts[:first]) or "layers", int(parts[first]), module)


def starred(name: str) -> str:
    """Replace the numbers in a dotted name by ``*``, so that a module has the same name in every layer."""
    return ".".join("*" if _is_number(part) else part for part in name.split("."))


def grids(values: Mapping[str, float]) -> tuple[Grid, ...]:
    """Arrange named values in grids, one per stack, with names without a number in the last one.

    Args:
        values: dotted name -> finite value.
    """
    stacks: dict[str, dict[GridPlace, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, value in values.items():
        where = place(name)
        stacks[where.stack][where].append(value)
    unnumbered = stacks.pop("", {})
    made = [_numbered(stack, cells) for stack, cells in sorted(stacks.items())]
    return (*made, _named(unnumbered)) if unnumbered else tuple(made)


def _numbered(stack: str, cells: Mapping[GridPlace, list[float]]) -> Grid:
    layers = sorted({where.layer for where in cells})
    modules = sorted({where.module for where in cells})
    row, column = ({key: index for index, key in enumerate(keys)} for keys in (layers, modules))
    entries = {(row[where.layer], column[where.module]): _entry(found) for where, found in cells.items()}
    return Grid(stack, tuple(map(str, layers)), tuple(modules), entries)


def _named(cells: Mapping[GridPlace, list[float]]) -> Grid:
    largest_first = sorted(cells.items(), key=lambda item: (-max(item[1]), item[0].module))
    shown = largest_first[:_UNNUMBERED_SHOWN]
    entries = {(row, 0): _entry(found) for row, (_, found) in enumerate(shown)}
    rows = tuple(where.module for where, _ in shown)
    return Grid("", rows, ("",), entries, left_out=len(largest_first) - len(shown))


def _entry(values: list[float]) -> Entry:
    return Entry(sum(values) / len(values), max(values), len(values))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10
