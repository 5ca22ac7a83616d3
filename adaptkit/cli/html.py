"""Building blocks of HTML reports: one file, no network, light and dark mode, readable on a phone.

Functions that take ``str`` escape it, since tensor names come from untrusted files. Markup has the type ``Html``, so
the type checker finds text that was not escaped by ``text``. As a second defence, a content security policy allows only
this module's script, by its hash, and no network requests.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NewType

from adaptkit import __version__

Html = NewType("Html", str)

DOCTYPE = "<!doctype html>"
"""First characters of every page."""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #5c6670; --line: #d5dae0; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e4e8ec; --faint: #98a2ad; --line: #343b43; --band: #1d2227; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2, summary { font-size: 1.15rem; font-weight: 600; margin: 2rem 0 .5rem; }
summary { cursor: pointer; }
p, figcaption, footer { color: var(--faint); margin: .25rem 0 .75rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .5rem; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:nth-child(even) { background: var(--band); }
td { overflow-wrap: break-word; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:first-child { min-width: 13rem; overflow-wrap: anywhere; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B4"; }
th[aria-sort=descending] button::after { content: " \\25BE"; }
figure { margin: 1rem 0 1.5rem; }
figure svg { display: block; }
.abreast { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
.abreast > * { flex: none; max-width: 100%; margin: 0; }
.abreast > figure { flex: 1 1 18rem; min-width: 0; }
figure svg text { font-family: system-ui, sans-serif !important; }
figure output { display: block; position: sticky; bottom: 0; min-height: 1.5em; background: var(--paper);
  overflow-wrap: anywhere; }
.cell { cursor: pointer; }
.cell:hover, .cell.chosen { stroke: currentColor; stroke-width: 1.5; }
"""

# A heading's button sorts its table; clicking a cell of a figure shows its tooltip below, since phones do not hover.
_SCRIPT = """
addEventListener("click", function (event) {
  const button = event.target.closest("th button");
  if (button) sort(button.closest("th"));
  const cell = event.target.closest(".cell");
  if (cell) {
    const figure = cell.closest("figure");
    for (const other of figure.querySelectorAll(".chosen")) other.classList.remove("chosen");
    cell.classList.add("chosen");
    figure.querySelector("output").textContent = cell.querySelector("title").textContent;
  }
});
function sort(heading) {
  const up = heading.getAttribute("aria-sort") !== "ascending", column = heading.cellIndex;
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = heading.closest("table").tBodies[0], key = (row) => {
    const cell = row.cells[column];
    return heading.className === "number" ? parseFloat(cell.dataset.value ?? "NaN") : cell.textContent;
  };
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  const rows = Array.from(body.rows, (row) => [key(row), row]);
  const known = rows.filter(([value]) => !Number.isNaN(value)), unknown = rows.filter(([value]) => Number.isNaN(value));
  known.sort(([a], [b]) => up ? compare(a, b) : compare(b, a));
  for (const [, row] of [...known, ...unknown]) body.append(row);
}
"""


@dataclass(frozen=True)
class Number:
    """A number in a table, sorted by its value.

    Attributes:
        value: sort key; None for a missing number, which sorts last and is shown as a dash.
        shown: displayed text.
    """

    value: float | None
    shown: str = ""


def visible(value: str) -> str:
    """Replace invisible characters (controls, text directions, unpaired surrogates) by escape sequences."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in value)


def text(value: str) -> Html:
    """Escape text for an element or a quoted attribute."""
    return Html(escape(visible(value)))


def page(title: str, *parts: Html) -> str:
    """Return a whole document.

    Args:
        title: title of the window and first heading.
        parts: results of ``paragraph``, ``facts``, ``table``, ``figure`` and ``section``.
    """
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'"
    return (
        f'{DOCTYPE}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{text(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n</main>\n<footer>adaptkit {__version__}</footer>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: Html, collapsed: bool = False) -> Html:
    """Return parts under a heading; ``collapsed`` ones open when the heading is clicked."""
    inside = "\n".join(parts)
    if collapsed:
        return Html(f"<details>\n<summary>{text(heading)}</summary>\n{inside}\n</details>")
    return Html(f"<section>\n<h2>{text(heading)}</h2>\n{inside}\n</section>")


def paragraph(value: str) -> Html:
    """Return a paragraph of text."""
    return Html(f"<p>{text(value)}</p>")


def facts(rows: Iterable[tuple[str, str]]) -> Html:
    """Return a list of labels and values."""
    return Html("<dl>\n" + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>\n" for k, v in rows) + "</dl>")


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Number]]) -> Html:
    """Return a table that can be sorted by clicking its headings.

    Args:
        columns: headings.
        rows: rows with a cell for each heading; a column holds either text or numbers.

    Raises:
        ValueError: the number of cells in a row differs from the number of headings.
    """
    body = [tuple(row) for row in rows]
    if any(len(row) != len(columns) for row in body):
        raise ValueError(f"a table of {len(columns)} columns has a row of another length")
    numeric = [bool(body) and isinstance(cell, Number) for cell in (body[0] if body else columns)]
    head = "".join(
        f'<th scope="col"{" class=number" if number else ""}><button type="button">{text(name)}</button></th>'
        for name, number in zip(columns, numeric, strict=True)
    )
    lines = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in body)
    return Html(
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>'
    )


def figure(caption: str, *pictures: Html, abreast: bool = False) -> Html:
    """Return pictures over a caption, with a line between them that shows the tooltip of a clicked cell.

    Args:
        caption: text below the pictures.
        pictures: results of ``adaptkit.cli.figures``.
        abreast: place the pictures side by side if there is room, instead of one below the other.
    """
    framed = [Html(f'<div class="scroll">{picture}</div>') for picture in pictures]
    drawn = side_by_side(*framed) if abreast else "\n".join(framed)
    return Html(f"<figure>\n{drawn}\n<output></output>\n<figcaption>{text(caption)}</figcaption>\n</figure>")


def side_by_side(*parts: Html) -> Html:
    """Return parts side by side, wrapped if there is no room."""
    inside = "\n".join(parts)
    return Html(f'<div class="abreast">\n{inside}\n</div>')


def _cell(cell: str | Number) -> str:
    if isinstance(cell, str):
        breakable = text(cell).replace(".", ".<wbr>")  # lines may break after the dots of a name
        return f"<td>{breakable}</td>"
    if cell.value is None:
        return '<td class="number">–</td>'
    return f'<td class="number" data-value="{float(cell.value):.12g}">{text(cell.shown)}</td>'
