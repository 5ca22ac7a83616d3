"""Pictures of pages: SVG by matplotlib, in the page's text colour for light and dark mode.

The same values give the same bytes: there is no date, identifiers have a fixed salt, and the user's ``matplotlibrc`` is
ignored.
"""

import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from adaptkit.cli.pages.heat_maps import starred
from adaptkit.cli.pages.page import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float64]
Found = TypeVar("Found")
_INK = "#010203"  # stands for the CSS keyword currentColor, which matplotlib does not know
_LABEL_LETTERS = 30
_TYPES = 12
"""Maximum number of module types that are drawn: those with the largest sizes."""

Lines = Mapping[str, Mapping[str, Sequence[float]]]
"""Name of a line -> name of a module -> its values."""


def histogram(values: Sequence[float], what: str, things: str) -> Markup:
    """Draw a histogram.

    Args:
        values: finite values, at least one.
        what: name and unit of the values.
        things: name of the things counted, in the plural.
    """
    with _figure(3.6, 1.8, what) as figure:
        axes = _axes(figure, what, things)
        axes.hist(values, bins=30, color="#3b6fb6")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, f"{len(values)} {things} by {what}: from {min(values):.4g} to {max(values):.4g}")


def curves_by_type(
    lines: Lines,
    sizes: Mapping[str, float],
    horizontal: str,
    vertical: str,
    *,
    logarithmic: bool = False,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Markup]:
    """Draw a figure for each type of module: the median over its modules, with the range shaded.

    Args:
        lines: values of each module at the positions 1, 2, ... of the horizontal axis.
        sizes: name of a module -> its size, which decides which types are drawn.
        horizontal: name of the horizontal axis.
        vertical: name and unit of the vertical axis; different for all figures of a page.
        logarithmic: whether the vertical axis is logarithmic; values that are zero up to rounding are left out.
        levels: name of a line -> name of a module -> height of a dotted horizontal line for its type.
    """
    largest: dict[str, float] = defaultdict(float)
    for name, size in sizes.items():
        largest[starred(name)] = max(largest[starred(name)], size)
    types = sorted(sorted(largest, key=lambda kind: (-largest[kind], kind))[:_TYPES])
    titles = Counter(kind.split("*.", 1)[-1] for kind in types)
    made = []
    for kind in types:
        bands = {line: _band(_of_type(kind, modules), logarithmic) for line, modules in lines.items()}
        bands = {line: band for line, band in bands.items() if band.size}
        if not bands:
            continue
        title = kind.split("*.", 1)[-1]
        with _figure(3.6, 2.4, f"{kind} {vertical}") as figure:
            axes = _axes(figure, horizontal, vertical)
            axes.set_title(
                _label(title if titles[title] == 1 else kind), fontsize=9, loc="left", pad=20 if len(bands) > 1 else 6
            )
            heights = {line: _of_type(kind, modules)[0] for line, modules in (levels or {}).items() if line in bands}
            _draw(axes, bands, heights, logarithmic)
            made.append(_svg(figure, f"{title}, {vertical} by {horizontal}: {', '.join(bands)}"))
    return made


def _of_type(kind: str, modules: Mapping[str, Found]) -> list[Found]:
    return [found for name, found in modules.items() if starred(name) == kind]


def _band(rows: Sequence[Sequence[float]], logarithmic: bool) -> Floats:
    """Return the lowest, median and highest value at each position, [3, positions], of rows of different lengths."""
    values = np.array(list(zip_longest(*rows, fillvalue=np.nan)), dtype=np.float64)  # a line for each position
    if logarithmic and values.size:
        values[~(values > 1e-9 * np.nanmax(values))] = np.nan
        values = values[~np.logical_or.accumulate(np.isnan(values).all(axis=1))]
    if not values.size:
        return np.empty((3, 0))
    return np.stack([np.nanmin(values, axis=1), np.nanmedian(values, axis=1), np.nanmax(values, axis=1)])


def _draw(axes: "Axes", bands: Mapping[str, Floats], levels: Mapping[str, float], logarithmic: bool) -> None:
    for name, (low, median, high) in bands.items():
        positions = np.arange(1, len(median) + 1)
        seen = "." if len(median) == 1 else ""  # a line of one point would be invisible
        (line,) = axes.plot(positions, median, label=name, linewidth=1.2, marker=seen)
        axes.fill_between(positions, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
        if name in levels:
            axes.axhline(levels[name], color=line.get_color(), linewidth=1, linestyle=":")
    if logarithmic:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 200 * bottom else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(bands) > 1:  # between title and axes, to cover no line
        axes.legend(
            fontsize=8, frameon=False, labelcolor=_INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(bands),
            borderaxespad=0.2,
        )  # fmt: skip


@contextmanager
def _figure(width: float, height: float, salt: str) -> Iterator[Figure]:
    """Yield an empty figure, in inches, with fixed matplotlib settings during the block.

    Args:
        width: of the axes.
        height: of the axes.
        salt: salt of the picture's identifiers; pictures on one page need different salts.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": ascii(salt), "text.parse_math": False}
        settings |= {"savefig.transparent": True, "font.size": 8} | dict.fromkeys(inked, _INK)
        matplotlib.rcParams.update(settings)
        yield Figure(figsize=(width, height))


def _axes(figure: Figure, horizontal: str, vertical: str) -> "Axes":
    axes = figure.add_axes((0, 0, 1, 1), facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    return axes


def _label(name: str) -> str:
    """Shorten a name to fit a figure and escape non-ASCII characters, for which matplotlib may have no font."""
    plain = "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in name)
    half = _LABEL_LETTERS // 2
    return plain if len(plain) <= _LABEL_LETTERS else f"{plain[: half - 1]}..{plain[1 - half :]}"


def _svg(figure: Figure, label: str) -> Markup:
    """Return a figure as an SVG element; its identifiers are those that something refers to.

    Args:
        figure: figure to draw.
        label: text alternative, for screen readers.
    """
    out = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", bbox_inches="tight", pad_inches=0.04, metadata=no_metadata)
    svg = re.sub(r'<g id="[^"]*"', "<g", out.getvalue().replace(_INK, "currentColor"))  # the same in every figure
    start = svg.index("<svg ") + len("<svg ")
    return Markup(f'<svg role="img" aria-label="{escape(visible(label))}" {svg[start:]}')
