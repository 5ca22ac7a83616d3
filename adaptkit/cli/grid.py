"""From dotted names to a picture's rows and columns: layer by module.

``model.layers.7.mlp.down_proj.weight`` is row 7, column ``mlp.down_proj`` of the grid ``model.layers``. Further numbers
are counters of one kind of module, such as experts, and share a column: ``block_sparse_moe.experts.*.w1``.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

_UNNUMBERED_SHOWN = 48  # names without a layer make a row each; more rows than this are no picture


@dataclass(frozen=True)
class Place:
    """Where a name belongs.

    Attributes:
        stack: what the layers are numbered in, such as ``model.layers``; empty for a name without a number.
        layer: the first number of the name; 0 without one.
        module: the rest, with ``*`` for further numbers; the whole name without a number.
    """

    stack: str
    layer: int
    module: str


@dataclass(frozen=True)
class Entry:
    """One cell.

    Attributes:
        mean: of the values that share the cell.
        largest: of them.
        count: how many share it.
    """

    mean: float
    largest: float
    count: int


@dataclass(frozen=True)
class Grid:
    """Values by layer and module.

    Attributes:
        stack: what the rows are numbered in; empty for names without a layer, which have a row each.
        rows: labels, by number.
        columns: labels, sorted; one empty label for names without a layer.
        entries: (row, column) -> what is there; a place that is absent has no value.
        left_out: names without a layer that found no room.
    """

    stack: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    entries: Mapping[tuple[int, int], Entry]
    left_out: int = 0


def place(name: str) -> Place:
    """Take a dotted name apart; a final ``.weight`` is dropped."""
    parts = name.removesuffix(".weight").split(".")
    numbered = [position for position, part in enumerate(parts) if _is_number(part)]
    if not numbered:
        return Place("", 0, ".".join(parts))
    first = numbered[0]
    module = starred(".".join(parts[first + 1 :])) or "weight"
    return Place(".".join(parts[:first]) or "layers", int(parts[first]), module)


def starred(name: str) -> str:
    """A dotted name with ``*`` for its numbers: the same for a module of every layer."""
    return ".".join("*" if _is_number(part) else part for part in name.split("."))


def grids(values: Mapping[str, float]) -> tuple[Grid, ...]:
    """Arrange named values for heat maps, one for each numbered stack, the names without a number last.

    Args:
        values: finite, by dotted name.
    """
    stacks: dict[str, dict[Place, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, value in values.items():
        where = place(name)
        stacks[where.stack][where].append(value)
    unnumbered = stacks.pop("", {})
    made = [_numbered(stack, cells) for stack, cells in sorted(stacks.items())]
    return (*made, _named(unnumbered)) if unnumbered else tuple(made)


def _numbered(stack: str, cells: Mapping[Place, list[float]]) -> Grid:
    layers = sorted({where.layer for where in cells})
    modules = sorted({where.module for where in cells})
    row, column = ({key: index for index, key in enumerate(keys)} for keys in (layers, modules))
    entries = {(row[where.layer], column[where.module]): _entry(found) for where, found in cells.items()}
    return Grid(stack, tuple(map(str, layers)), tuple(modules), entries)


def _named(cells: Mapping[Place, list[float]]) -> Grid:
    largest_first = sorted(cells.items(), key=lambda item: (-max(item[1]), item[0].module))
    shown = largest_first[:_UNNUMBERED_SHOWN]
    entries = {(row, 0): _entry(found) for row, (_, found) in enumerate(shown)}
    rows = tuple(where.module for where, _ in shown)
    return Grid("", rows, ("",), entries, left_out=len(largest_first) - len(shown))


def _entry(values: list[float]) -> Entry:
    return Entry(sum(values) / len(values), max(values), len(values))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10
