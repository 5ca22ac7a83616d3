"""Printing and writing reports, as a JSON document or a short table."""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO, TypeVar

from adaptkit.cli.repositories import as_repositories
from adaptkit.errors import DISK_HINTS, UsageError, install_hint
from adaptkit.hub.secrets import redact
from adaptkit.wording import counted as counted
from adaptkit.wording import size as size

Item = TypeVar("Item")
Row = tuple[str, str | None]
"""Label and value; without a value, the row is not shown."""
WORST = 3
"""Number of entries that a table lists of many: those that lose most."""
_BEGINNING = 1 << 20
_KEYS = re.compile(rb'^  "(\w+)": ', re.MULTILINE)
"""The outermost keys of a written report."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that act on a terminal or change the order of the text, except tabs and line feeds."""


def plain(text: str) -> str:
    """Replace control characters by escape sequences: names in untrusted files may contain commands to the terminal."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def show(report: Any, rows: Iterable[Row], *, as_json: bool, quiet: bool, above: Iterable[str] = ()) -> None:
    """Print a report on stdout.

    Args:
        report: a dataclass, printed by ``--json``.
        rows: labels and values of the table that is printed otherwise.
        as_json: print the JSON document.
        quiet: print no table.
        above: lines printed above the rows.
    """
    if as_json:
        say(_document(report))
    elif not quiet:
        lines, known = list(above), [(label, as_repositories(value)) for label, value in rows if value]
        say(*lines, *([""] if lines else []), *aligned(known))


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> Iterator[str]:
    """Yield rows of cells in columns; a last cell of several lines continues below its first one.

    Args:
        rows: the rows, of equally many cells.
        right: columns that are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    indent = "\n" + " " * sum(width + 2 for width in widths[:-1])
    for row in rows:
        cells = (
            f"{cell:>{width}}" if place in right else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip().replace("\n", indent)


def branches(
    children: Sequence[Item], below: Callable[[Item], Sequence[Item]], indent: str = ""
) -> Iterator[tuple[str, Item]]:
    """Yield the items below the root of a tree, depth first, each after the lines that lead to it.

    Args:
        children: items directly below the root.
        below: returns the items below an item; called after that item was yielded.
        indent: what comes before the lines.
    """
    for number, child in enumerate(children, 1):
        last = number == len(children)
        yield indent + ("└── " if last else "├── "), child
        yield from branches(below(child), below, indent + ("    " if last else "│   "))


def _document(report: Any) -> str:
    return json.dumps(_jsonable(asdict(report)), indent=2, allow_nan=False)


def _jsonable(value: Any) -> Any:
    """Return a report's values with NaN and infinities, from overflowing sums, as null: JSON does not have them."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def notes(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints one-line notes on stderr; one that does nothing if quiet."""
    if quiet:
        return lambda text: None
    return lambda text: print(f"note: {plain(as_repositories(redact(text)))}", file=sys.stderr, flush=True)


def torchrun_rank() -> str:
    """Return the rank that torchrun gave this process; "0" without torchrun. Rank 0 reports for all processes."""
    return os.environ.get("RANK", "0") if "MASTER_ADDR" in os.environ else "0"


def check_place(path: Path, option: str, what: str = "", is_ours: Callable[[bytes], bool] | None = None) -> None:
    """Refuse, before a command's work, a path at which it cannot write a file afterwards.

    Args:
        path: path of the file.
        option: option that names it, for messages.
        what: kind of file, for messages.
        is_ours: called with the first ``_BEGINNING`` bytes of an existing file; returns whether it is of this kind and
            may be replaced. None if the command appends to any file.

    Raises:
        UsageError: no file can be written there, it would change an artifact, or a file of another kind exists.
    """
    from adaptkit.checkpoint.place import refuse_inside_artifact

    is_written_to = _exists(path) and (is_ours is None or not _is_replaced(path))
    place = path if is_written_to else Path(os.path.realpath(path)).parent
    takes = os.access(place, os.W_OK) and (is_written_to or place.is_dir())
    if _exists(path) is None or path.is_dir() or not takes:
        raise UsageError(f"{option} {path}: cannot write a file there", hint=f"choose another {option}")
    refuse_inside_artifact(Path(os.path.realpath(path)).parent, f"{option} {path}: is", option)
    if is_ours is not None and path.is_file():
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING)
        if beginning and not is_ours(beginning):
            raise UsageError(f"{option} {path}: already exists, and is not a {what}", hint=f"choose another {option}")


def check_page(path: Path | None, pictures: bool = True) -> None:
    """Check, before a command's work, that its HTML page can be drawn and written afterwards.

    Args:
        path: path of the page; None if no page is wanted.
        pictures: whether the page has pictures.

    Raises:
        UsageError: matplotlib is missing, no file can be written there, or there is a file that is not such a page.
    """
    if path is None:
        return
    try:
        if pictures:
            import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--html needs matplotlib, which cannot be imported: {error}",
            hint=f"{install_hint('report')}, or leave out --html",
        ) from error
    check_place(path, "--html", "page of adaptkit", lambda start: start.startswith(b"<!doctype html>"))


def _exists(path: Path) -> bool | None:
    """Return whether a path exists; None if nothing can: the name is too long, or leads round in links."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return True


def check_report_file(path: Path, kind: type) -> None:
    """Refuse a path at which a report cannot be written, or at which another kind of file exists.

    Args:
        path: path of the file.
        kind: class of the report.

    Raises:
        UsageError: see ``check_place``.
    """
    first = [field.name.encode() for field in fields(kind)][:2]
    check_place(path, "--output-file", "report of this command", lambda start: _KEYS.findall(start)[:2] == first)


def in_turn(*actions: Callable[[], None]) -> None:
    """Call the actions in order, each of them even if earlier ones raise."""
    with ExitStack() as stack:
        for action in reversed(actions):
            stack.callback(action)


def write_report(report: Any, path: Path) -> None:
    """Write the document that ``--json`` prints to a file."""
    write_whole(path, _document(report) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically; an existing pipe, link or other special file is written to instead of being replaced.

    Raises:
        DiskError: the file cannot be written.
    """
    from adaptkit.checkpoint.writer import DiskError, replace_file

    content = text.encode("utf-8", "backslashreplace")
    try:
        if _is_replaced(path):
            replace_file(path, content)
        else:
            path.write_bytes(content)
    except (DiskError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DiskError) else error
        reason, number = (cause.strerror, cause.errno) if isinstance(cause, OSError) else (None, None)
        raise DiskError(f"{path}: cannot be written: {reason}", DISK_HINTS.get(number or 0, "")) from error


def _is_replaced(path: Path) -> bool:
    return not os.path.lexists(path) or (path.is_file() and not path.is_symlink())


def say(*lines: str, styled: bool = False) -> None:
    """Print lines on stdout at once; click handles a BrokenPipeError.

    Args:
        lines: printed with their control characters escaped.
        styled: print the lines as they are, since they contain colours.

    Raises:
        DiskError: they cannot be written.
    """
    try:
        print("\n".join(lines if styled else map(plain, lines)), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        from adaptkit.checkpoint.writer import DiskError

        silence(sys.stdout)
        raise DiskError(f"stdout: cannot be written: {error.strerror}") from error


def silence(stream: TextIO) -> None:
    """Redirect a stream to /dev/null; else Python would flush its buffer at exit, fail, and print an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_discarded(stream: TextIO) -> bool:
    """Return whether what a stream gets is lost: it leads to /dev/null, also after ``silence``."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))
    except OSError:  # not a file's stream
        return False


def span(ends: tuple[int, int]) -> str:
    """Format the lowest and the highest of some numbers: 8, or 4 to 8."""
    low, high = ends
    return f"{low}" if low == high else f"{low} to {high}"


def percent(fraction: float) -> str:
    """Format a fraction: 12.3 %."""
    return f"{100 * fraction:.3g} %"


def shape(dimensions: Sequence[int]) -> str:
    """Format a tensor's shape: 64×128."""
    return "×".join(map(str, dimensions)) or "scalar"
