"""What pages share: maps, curves by type of module, and tables."""

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
"""How many types of modules have pictures of their own, those with the largest differences."""

Lines = Mapping[str, Mapping[str, Sequence[float]]]
"""Name of a line -> name of a module -> its numbers."""


def maps(
    values: Mapping[str, float], what: str, caption: str, limits: tuple[float, float], *, diverging: bool = False
) -> Html:
    """A heat map for each stack of layers, and a remark on what found no room in them.

    Args:
        values: finite, by dotted name.
        what: they are, with their unit.
        caption: below.
        limits: values of the first and the last colour.
        diverging: values have a sign.
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
    """A picture for each type of module: the median over its modules, and everything between the extremes shaded.

    Args:
        lines: the numbers of each module, in the order of the horizontal axis, which counts from 1.
        types: which to draw, in this order; names with ``*`` for numbers.
        horizontal: name of the axis.
        vertical: name of the axis, and unit.
        logarithmic: the vertical axis is; what is not above zero has no point.
        levels: type -> line -> height of a dotted line.
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
    """The types of the modules with the largest sizes, by name.

    Args:
        sizes: name of a module, and how large it is.
    """
    largest: dict[str, float] = defaultdict(float)
    for name, size in sizes:
        largest[starred(name)] = max(largest[starred(name)], size)
    return sorted(sorted(largest, key=lambda kind: (-largest[kind], kind))[:TYPES_DRAWN])


def shortened(kind: str) -> str:
    """A type without what its layers are numbered in."""
    return kind.split("*.", 1)[-1]


def beside(values: Sequence["ValueDifference"], found: "FilesDifference", uncounted: bool = False) -> list[Html]:
    """Configuration, tokenizer, chat templates and other files.

    Args:
        values: of the configuration.
        found: in other files.
        uncounted: the configuration's differences do not make the two different.
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
    """A table of tensors that differ."""
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
    """What one of the two has alone."""
    rows = [*((name, "first") for name in first), *((name, "second") for name in second)]
    return [section(f"{heading} in one only", table(("name", "only in"), rows))] if rows else []


def folder_name(path: str) -> str:
    """The last part of a path, or of a name on the Hub."""
    return path.rstrip("/").rpartition("/")[2]


def share(value: float | None) -> Number:
    """A fraction as a cell."""
    return Number(value, "" if value is None else percent(value))


def number(value: float | None, form: str = ".3g") -> Number:
    """A number as a cell."""
    return Number(value, "" if value is None else format(value, form))


def three_digits(value: float) -> str:
    """141, 12.0, 0.521, 2e-05: what a cell has room for."""
    return f"{value:.0e}" if 0 < abs(value) < 0.01 else f"{value:#.3g}".rstrip(".")


def signed(value: float) -> str:
    """A cosine: +0.52."""
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


def _columns(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """The first numbers of all rows, then the second ones, and so on; rows may end before others."""
    longest = max(map(len, rows), default=0)
    return [[row[place] for row in rows if place < len(row)] for place in range(longest)]


def _above_zero(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """Up to where nothing is above rounding, which a logarithm would make a cliff of."""
    top = max((value for column in columns for value in column), default=0.0)
    kept = [[value for value in column if value > 1e-9 * top] for column in columns]
    return kept[: next((place for place, column in enumerate(kept) if not column), len(kept))]


def _value(value: str | None) -> str:
    return "absent" if value is None else value


def _two(values: tuple[str, ...]) -> str:
    return values[0] if values[0] == values[1] else f"{values[0]} → {values[1]}"
