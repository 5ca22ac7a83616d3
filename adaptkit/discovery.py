"""A folder is a registry: one file is one entry, and the file's name is the entry's public name.

Adding a format, a stacking method or a command means adding a file. Modules whose name begins with ``_`` are
private helpers and no entries. Underscores in file names are dashes on the command line only.
"""

import pkgutil
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from adaptkit.errors import UsageError


def names(package: ModuleType) -> list[str]:
    """List the entries of a package, sorted, without importing any of them."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


@cache
def load(package: ModuleType, name: str, attribute: str) -> Any:
    """Import one entry and return the object that it defines under ``attribute``.

    Raises:
        UsageError: there is no such entry; the message lists those that exist.
    """
    known = names(package)
    if name not in known:
        kind = package.__name__.rpartition(".")[2]
        raise UsageError(f"{kind}: there is no {name!r}", hint=f"choose one of: {', '.join(known)}")
    return getattr(import_module(f"{package.__name__}.{name}"), attribute)
