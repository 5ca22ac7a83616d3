"""Figures for HTML reports: SVG drawn by matplotlib, in the page's text colour for light and dark mode.

The same values give the same bytes: there is no date, identifiers have a fixed salt, and the user's ``matplotlibrc`` is
ignored. Coordinates are in points, 72 per inch.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from adaptkit.cli.grid import Entry, Grid
from adaptkit.cli.html import Html, visible
from adaptkit.errors import UsageError, install_hint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_PREFIXES = {"": _SVG, "xlink": "http://www.w3.org/1999/xlink"}  # the only prefixes that browsers resolve inside HTML
_INK = "#010203"  # placeholder that _svg replaces by the CSS keyword currentColor
_CELL_WIDTH, _CELL_HEIGHT = 0.44, 0.22  # inches; this height has room for the number
_LONGEST_COLUMN = 12.0  # inches; with more rows, cells are flatter, at least _FLATTEST_CELL
_FLATTEST_CELL = 0.08
_LABEL_LETTERS = 30
_SHADES = 32


def require_matplotlib() -> None:
    """Check, before a command's work, that figures can be drawn after it.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--html needs matplotlib, which cannot be imported: {error}",
            hint=f"{install_hint('report')}, or leave out --html",
        ) from error


def heat_map(
    grid: Grid, what: str, limits: tuple[float, float], shown: Callable[[float], str], *, diverging: bool = False
) -> Html:
    """Draw a heat map of layers and modules; every cell has its value as a tooltip.

    Args:
        grid: the values, at least one; cells show the mean of values that share them.
        what: name and unit of the values, for the scale.
        limits: values of the first and the last colour; grids to be compared need the same limits.
        shown: formats a value, without its unit.
        diverging: use a colour map of two hues that is pale in the middle, instead of one from dark to bright.
    """
    with _figure() as figure:
        from matplotlib import colormaps
        from matplotlib.colors import Normalize

        shades = colormaps["RdBu" if diverging else "viridis"].resampled(_SHADES)
        scale = Normalize(*limits)
        _draw_cells(_grid_axes(figure, grid), grid, scale, shades, shown)
        if limits[0] < limits[1]:
            _draw_scale(figure, scale, shades, limits, what, shown)
        titles = {f"cell-{r}-{c}": _title(grid, r, c, entry, shown) for (r, c), entry in grid.entries.items()}
        place = f"{grid.stack} by layer and module" if grid.stack else "modules without a layer"
        means = [entry.mean for entry in grid.entries.values()]
        label = f"{what}, {place}: from {shown(min(means))} to {shown(max(means))}"
        return _svg(figure, f"{what} {grid.stack}", label, titles)


def histogram(values: Sequence[float], what: str, things: str) -> Html:
    """Draw a histogram.

    Args:
        values: finite values, at least one.
        what: name and unit of the values.
        things: name of the things counted, in the plural.
    """
    with _figure() as figure:
        from matplotlib.ticker import MaxNLocator

        figure.set_size_inches(3.6, 1.8)
        axes = _plain_axes(figure, what, things)
        axes.hist(values, bins=30, color="#3b6fb6")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        label = f"{len(values)} {things} by {what}: from {min(values):.4g} to {max(values):.4g}"
        return _svg(figure, f"histogram {what}", label, {})


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    horizontal: str,
    vertical: str,
    *,
    logarithmic: bool = False,
    title: str = "",
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Html:
    """Draw lines over a common axis.

    Args:
        series: name of a line -> finite points (x, y), in drawing order.
        horizontal: name and unit of x.
        vertical: name and unit of y.
        logarithmic: whether the vertical axis is logarithmic.
        title: title above the figure; figures on one page with the same ``vertical`` need different titles.
        bands: name of a line -> points (x, low, high) of the band shaded around it.
        levels: name of a line -> height of a dotted horizontal line in its colour.
    """
    with _figure() as figure:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        figure.set_size_inches(3.6, 2.4)
        axes = _plain_axes(figure, horizontal, vertical)
        lines = []
        for points in series.values():
            seen = "." if len(points) == 1 else ""  # a line of one point would be invisible
            lines += axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.2, marker=seen)
        colours = {name: line.get_color() for name, line in zip(series, lines, strict=True)}
        for name, band in (bands or {}).items():
            x, low, high = ([point[place] for point in band] for place in range(3))
            axes.fill_between(x, low, high, color=colours[name], alpha=0.18, linewidth=0)
        for name, level in (levels or {}).items():
            axes.axhline(level, color=colours[name], linewidth=1, linestyle=":")
        if logarithmic:
            axes.set_yscale("log")
            bottom, top = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 200 * bottom else (1,)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if len(series) > 1:
            place: dict[str, Any] = {}
            if title:  # the legend is between title and axes, to cover no line
                place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(series), "borderaxespad": 0.2}
            names = [_label(name) for name in series]
            axes.legend(lines, names, fontsize=8, frameon=False, labelcolor=_INK, **place)
        if title:
            axes.set_title(_label(title), fontsize=9, loc="left", pad=20 if len(series) > 1 else 6)
        about = f"{title} {vertical}".strip()
        return _svg(figure, f"curves {about}", f"{about} by {horizontal}: {', '.join(series)}", {})


@contextmanager
def _figure() -> Iterator["Figure"]:
    """Yield an empty figure, with fixed matplotlib settings during the block."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "savefig.transparent": True}
        for inked in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
            settings[inked] = _INK
        matplotlib.rcParams.update({**settings, "font.size": 8})
        yield Figure()


def _grid_axes(figure: "Figure", grid: Grid) -> "Axes":
    """Add axes on which cell (row, column) is a unit square, sized so that a phone shows seven columns."""
    rows, columns = len(grid.rows), len(grid.columns)
    height = max(_FLATTEST_CELL, min(_CELL_HEIGHT, _LONGEST_COLUMN / rows))
    figure.set_size_inches(columns * _CELL_WIDTH, rows * height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows, 0), frame_on=False)
    axes.tick_params(length=0, pad=3)
    axes.xaxis.tick_top()
    axes.set_xticks([c + 0.5 for c in range(columns)], [_label(c) for c in grid.columns], rotation=90)
    every = next(step for step in (1, 2, 4, 8, 16, 32, 10**9) if step * height >= 0.14)
    labelled = range(0, rows, every)
    axes.set_yticks([r + 0.5 for r in labelled], [_label(grid.rows[r]) for r in labelled])
    if grid.stack:
        axes.set_ylabel(_label(grid.stack))
    return axes


def _draw_cells(
    axes: "Axes", grid: Grid, scale: "Normalize", shades: "Colormap", shown: Callable[[float], str]
) -> None:
    from matplotlib.patches import Rectangle

    roomy = len(grid.rows) * _CELL_HEIGHT <= _LONGEST_COLUMN
    for (row, column), entry in sorted(grid.entries.items()):
        colour = shades(scale(entry.mean))
        cell = Rectangle((column, row), 1, 1, facecolor=colour, linewidth=0, clip_on=False)
        cell.set_gid(f"cell-{row}-{column}")
        axes.add_patch(cell)
        if roomy:
            luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
            on_it = "#ffffff" if luminance < 0.55 else "#000000"
            axes.text(column + 0.5, row + 0.5, shown(entry.mean), color=on_it, fontsize=7, ha="center", va="center")


def _draw_scale(
    figure: "Figure",
    scale: "Normalize",
    shades: "Colormap",
    limits: tuple[float, float],
    what: str,
    shown: Callable[[float], str],
) -> None:
    """Draw a colour bar under the grid, two inches long for any grid size."""
    from matplotlib.cm import ScalarMappable

    height = figure.get_size_inches()[1]
    below = figure.add_axes((0, -0.26 / height, 2 / figure.get_size_inches()[0], 0.12 / height))
    bar = figure.colorbar(ScalarMappable(scale, shades), cax=below, orientation="horizontal")
    below.set_frame_on(False)
    marks = [limits[0], sum(limits) / 2, limits[1]]
    bar.set_ticks(marks, labels=[shown(mark) for mark in marks])
    bar.set_label(_label(what))


def _plain_axes(figure: "Figure", horizontal: str, vertical: str) -> "Axes":
    axes = figure.add_axes((0, 0, 1, 1), facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(_label(horizontal))
    axes.set_ylabel(_label(vertical))
    return axes


def _title(grid: Grid, row: int, column: int, entry: Entry, shown: Callable[[float], str]) -> str:
    where = f"{grid.stack}.{grid.rows[row]} {grid.columns[column]}" if grid.stack else grid.rows[row]
    several = f" (mean of {entry.count}, at most {shown(entry.largest)})" if entry.count > 1 else ""
    return f"{where}: {shown(entry.mean)}{several}"


def _label(name: str) -> str:
    """Shorten a name to fit a figure and escape non-ASCII characters; tooltips and tables have the full name."""
    plain = "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in name)
    half = _LABEL_LETTERS // 2
    return plain if len(plain) <= _LABEL_LETTERS else f"{plain[: half - 1]}..{plain[1 - half :]}"


def _svg(figure: "Figure", salt: str, label: str, titles: Mapping[str, str]) -> Html:
    """Draw a figure as an SVG element of a page.

    Args:
        figure: figure to draw.
        salt: salt of the SVG's identifiers; figures on one page need different salts.
        label: text alternative, for screen readers.
        titles: identifier of a cell -> its tooltip.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = salt
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", pad_inches=0.04, metadata={"Date": None})
    root = ElementTree.fromstring(out.getvalue().replace(_INK, "currentColor"))
    for element in list(root):
        if element.tag.endswith("metadata"):
            root.remove(element)
    used = out.getvalue()
    for parent in list(root.iter()):
        for index, element in enumerate(list(parent)):
            name = element.get("id", "")
            if name in titles:
                parent[index] = _cell(element, titles[name])
            elif f"#{name}" not in used:  # matplotlib gives groups the same ids in every figure
                element.attrib.pop("id", None)
    root.set("role", "img")
    root.set("aria-label", visible(label))
    for prefix, address in _PREFIXES.items():
        ElementTree.register_namespace(prefix, address)
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _cell(group: ElementTree.Element, title: str) -> ElementTree.Element:
    """Return only the cell's coloured shape with a tooltip: a tenth of the bytes that matplotlib writes."""
    drawn = group.find(f"{{{_SVG}}}path")
    if drawn is None:
        raise ValueError("matplotlib drew a cell without a shape")
    style = dict(part.split(":") for part in drawn.get("style", "").replace(" ", "").split(";") if part)
    path = ElementTree.Element(f"{{{_SVG}}}path", {"class": "cell", "d": " ".join(drawn.get("d", "").split())})
    path.set("fill", style["fill"])
    ElementTree.SubElement(path, f"{{{_SVG}}}title").text = visible(title)
    return path
