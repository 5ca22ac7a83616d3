"""Reports for programs (one JSON document) and for people (a short table)."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

Row = tuple[str, str]


def show(report: Any, rows: Iterable[Row], *, as_json: bool, quiet: bool) -> None:
    """Print a report on stdout.

    Args:
        report: a dataclass; what ``--json`` prints.
        rows: what people get: label and value.
        as_json: print the document.
        quiet: print nothing.
    """
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    elif not quiet:
        table = list(rows)
        width = max(len(label) for label, _ in table)
        for label, value in table:
            aligned = value.replace("\n", "\n" + " " * (width + 2))
            print(f"{label:<{width}}  {aligned}".rstrip())


def size(count: float) -> str:
    """A number of bytes for people, in powers of ten: 269.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def percent(fraction: float) -> str:
    """A fraction for people: 12.3 %."""
    return f"{100 * fraction:.3g} %"
