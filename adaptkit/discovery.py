"""A folder is a registry: one file is one entry, and the file's name is the entry's public name.

Adding a format, a stacking method or a command means adding a file. Modules whose name begins with ``_`` are
private helpers, not entries. Underscores in file names are dashes on the command line only.
"""

import difflib
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from adaptkit.errors import UsageError


def names(package: ModuleType) -> list[str]:
    """List the entries of a package, sorted, without importing any of them."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a mistyped one most likely means; None if none is similar.

    Among equally similar names, prefer the longest common prefix, since the end of a name is what people leave out:
    ``bas`` means ``base`` rather than ``bias``.
    """
    alike = difflib.get_close_matches(name, sorted(known), n=5)

    def likeness(other: str) -> tuple[float, int]:
        prefix = sum(other.startswith(name[:end]) for end in range(1, len(name) + 1))
        return difflib.SequenceMatcher(None, other, name).ratio(), prefix

    return max(alike, key=likeness, default=None)


@cache
def load(package: ModuleType, name: str, attribute: str) -> Any:
    """Import one entry and return the object that it defines under ``attribute``; a UsageError lists the entries."""
    known = names(package)
    if name not in known:
        kind = package.__name__.rpartition(".")[2]
        raise UsageError(f"{kind}: unknown name {name!r}", hint=f"choose one of: {', '.join(known)}")
    return getattr(import_module(f"{package.__name__}.{name}"), attribute)
