"""Parts that several pages use: heat maps, curves by module type, and tables."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from adaptkit.cli import figures
from adaptkit.cli.grid import grids, starred
from adaptkit.cli.html import Html, Number, facts, figure, paragraph, section, table
from adaptkit.cli.output import counted, percent

if TYPE_CHECKING:
    from adaptkit.operations._diff.files import FilesDifference, ValueDifference
    from adaptkit.operations._diff.tensors import TensorDifference

TYPES_DRAWN = 12
"""Maximum number of module types with figures; those with the largest differences are shown."""

Lines = Mapping[str, Mapping[str, Sequence[float]]]
"""Name of a line -> name of a module -> its values."""


def maps(
    values: Mapping[str, float], what: str, caption: str, limits: tuple[float, float], *, diverging: bool = False
) -> Html:
    """Return a heat map for each stack of layers; the caption says how many values are left out.

    Args:
        values: dotted name -> finite value.
        what: name and unit of the values.
        caption: text below the maps.
        limits: values of the first and the last colour.
        diverging: whether values are signed.
    """
    made = grids(values)
    left_out = sum(grid.left_out for grid in made)
    if left_out:
        are = "is" if left_out == 1 else "are"
        caption += f" {counted(left_out, 'smaller value')} of modules without a layer number {are} only in the table."
    shown = signed if diverging else three_digits
    return figure(caption, *(figures.heat_map(grid, what, limits, shown, diverging=diverging) for grid in made))


def curves_by_type(
    lines: Lines,
    types: Sequence[str],
    horizontal: str,
    vertical: str,
    *,
    logarithmic: bool = False,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Html]:
    """Return a figure for each type of module: the median over its modules, with the range shaded.

    Args:
        lines: values of each module at the positions 1, 2, ... of the horizontal axis.
        types: module types to draw, in order; names with ``*`` for numbers.
        horizontal: name of the horizontal axis.
        vertical: name and unit of the vertical axis.
        logarithmic: whether the vertical axis is logarithmic; values that are zero up to rounding are left out.
        levels: type -> name of a line -> height of a dotted horizontal line.
    """
    made = []
    titles = Counter(map(shortened, types))
    for kind in types:
        series: dict[str, list[tuple[float, float]]] = {}
        bands: dict[str, list[tuple[float, float, float]]] = {}
        for line, modules in lines.items():
            columns = _columns([numbers for name, numbers in modules.items() if starred(name) == kind])
            if logarithmic:
                columns = _above_zero(columns)
            if columns:
                series[line] = [(x, statistics.median(found)) for x, found in enumerate(columns, 1)]
                bands[line] = [(x, min(found), max(found)) for x, found in enumerate(columns, 1)]
        if series:
            level = {line: height for line, height in (levels or {}).get(kind, {}).items() if line in series}
            made.append(
                figures.curves(
                    series,
                    horizontal,
                    vertical,
                    logarithmic=logarithmic,
                    title=shortened(kind) if titles[shortened(kind)] == 1 else kind,
                    bands=bands,
                    levels=level,
                )
            )
    return made


def largest_types(sizes: Iterable[tuple[str, float]]) -> list[str]:
    """Return the ``TYPES_DRAWN`` module types with the largest sizes, sorted by name.

    Args:
        sizes: (name of a module, its size).
    """
    largest: dict[str, float] = defaultdict(float)
    for name, size in sizes:
        largest[starred(name)] = max(largest[starred(name)], size)
    return sorted(sorted(largest, key=lambda kind: (-largest[kind], kind))[:TYPES_DRAWN])


def shortened(kind: str) -> str:
    """Return a module type without the prefix up to its first number."""
    return kind.split("*.", 1)[-1]


def beside(values: Sequence["ValueDifference"], found: "FilesDifference", uncounted: bool = False) -> list[Html]:
    """Return sections on differences in configuration, chat templates and other files.

    Args:
        values: differences in the configuration.
        found: differences in other files.
        uncounted: whether differences in the configuration do not count as a difference of the two.
    """
    made = []
    keys = [*values, *found.values]
    if keys:
        rows = [(v.file, v.key, _value(v.first), _value(v.second)) for v in keys]
        remark = (
            "The effect of the adapter's configuration on its tensors is in the figures above, and is not counted here."
        )
        parts = [paragraph(remark)] if uncounted and values else []
        made.append(section("Configuration", *parts, table(("file", "key", "first", "second"), rows)))
    if found.files:
        files = [(f.file, f.sha256[0] or "absent", f.sha256[1] or "absent") for f in found.files]
        made.append(section("Other files", table(("file", "sha256 of the first", "of the second"), files)))
    for template in found.templates:
        where = " and ".join(file or "absent" for file in template.files)
        lines = [("files", where), ("changes", "\n".join(template.lines))]
        made.append(section(f"Chat template {template.name}", facts(lines)))
    return made


def tensors(found: Sequence["TensorDifference"], roles: bool = False) -> Html:
    """Return a table of the tensors that differ."""
    rows: list[tuple[str | Number, ...]] = [
        (
            t.name,
            *([t.role] if roles else []),
            share(t.relative),
            share(t.changed / t.compared if t.compared else None),
            share(t.change.energy["16"] if t.change else None),
            number(t.change.stable_rank if t.change else None),
            number(t.change.effective_rank if t.change else None),
            _two(t.dtypes),
            _two(tuple("×".join(map(str, shape)) or "scalar" for shape in t.shapes)),
            t.remark,
        )
        for t in found
    ]
    heads = ("tensor", *(["what"] if roles else []), "difference", "elements", "in 16 directions", "stable rank")
    return table((*heads, "effective rank", "type", "shape", "remark"), rows)


def names(heading: str, first: Sequence[str], second: Sequence[str]) -> list[Html]:
    """Return a section with the names that only one of the two has; none if there are no such names."""
    rows = [*((name, "first") for name in first), *((name, "second") for name in second)]
    return [section(f"{heading} in one only", table(("name", "only in"), rows))] if rows else []


def folder_name(path: str) -> str:
    """Return the last part of a path or of a name on the Hub."""
    return path.rstrip("/").rpartition("/")[2]


def share(value: float | None) -> Number:
    """Return a fraction as a table cell."""
    return Number(value, "" if value is None else percent(value))


def number(value: float | None, form: str = ".3g") -> Number:
    """Return a number as a table cell."""
    return Number(value, "" if value is None else format(value, form))


def three_digits(value: float) -> str:
    """Format a value to fit a cell: 141, 12.0, 0.521, 2e-05."""
    return f"{value:.0e}" if 0 < abs(value) < 0.01 else f"{value:#.3g}".rstrip(".")


def signed(value: float) -> str:
    """Format a signed value such as a cosine: +0.52."""
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


def _columns(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Transpose rows of different lengths: return the first values of all rows, then the second ones, and so on."""
    longest = max(map(len, rows), default=0)
    return [[row[place] for row in rows if place < len(row)] for place in range(longest)]


def _above_zero(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """Drop values that are zero up to rounding, and all columns from the first empty one, for a logarithmic axis."""
    top = max((value for column in columns for value in column), default=0.0)
    kept = [[value for value in column if value > 1e-9 * top] for column in columns]
    return kept[: next((place for place, column in enumerate(kept) if not column), len(kept))]


def _value(value: str | None) -> str:
    return "absent" if value is None else value


def _two(values: tuple[str, ...]) -> str:
    return values[0] if values[0] == values[1] else f"{values[0]} → {values[1]}"
