"""Arguments of the public functions besides options: paths given as text, a single value where several are accepted.

Every function raises a UsageError that names the argument.
"""

import os
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from adaptkit.errors import UsageError

AnyPath: TypeAlias = str | PathLike[str]
Options = TypeVar("Options")


def as_path(path: AnyPath, name: str = "path") -> Path:
    """Return the path as a ``Path``; an empty one, which ``pathlib`` takes for the current folder, is an error."""
    text = os.fspath(path) if isinstance(path, (str, PathLike)) else None
    if not isinstance(text, str):
        raise UsageError(f"{name}: must be a path, found {_kind(path)}", hint="pass a str or a pathlib.Path")
    if not text:
        raise UsageError(f"{name}: the path is empty", hint="write . for the current folder")
    return Path(path)


def as_paths(paths: AnyPath | Iterable[AnyPath], name: str = "path") -> tuple[Path, ...]:
    """Return one path or several as a tuple; a str is one path, not a sequence of characters."""
    return tuple(as_path(path, name) for path in _several(paths, (str, PathLike)))


def as_path_or_none(path: AnyPath | None, name: str = "path") -> Path | None:
    """Return the path as a ``Path``; None if it is None."""
    return None if path is None else as_path(path, name)


def as_text(given: str, name: str = "text") -> str:
    """Return a text unchanged."""
    if not isinstance(given, str):
        raise UsageError(f"{name}: must be text, found {_kind(given)}", hint="pass a str")
    return given


def as_texts(given: str | Iterable[str], name: str = "text") -> tuple[str, ...]:
    """Return one text or several as a tuple."""
    return tuple(as_text(text, name) for text in _several(given, (str,)))


def check_flags(**given: bool) -> None:
    """Refuse arguments that are neither true nor false: a text such as "no" counts as true in Python."""
    for name, flag in given.items():
        if not isinstance(flag, bool):
            raise UsageError(f"{name}: must be true or false, found {repr(flag)[:40]}", hint="pass a bool")


def checked_options(given: Options | None, kind: type[Options], name: str = "options") -> Options:
    """Return options of this class, and not, say, a dict; the defaults if None is given."""
    if given is not None and not isinstance(given, kind):
        found = f"expected {kind.__name__}, found {type(given).__name__}"
        raise UsageError(f"{name}: {found}", hint=f"pass adaptkit.{kind.__name__}(...)")
    return kind() if given is None else given


def path_hint(path: AnyPath) -> str:
    """Return a hint for a path that does not exist."""
    of_a_shell = str(path).startswith("~")
    return "write the full path: only a shell expands ~" if of_a_shell else "check the path"


def folder_hint(path: AnyPath) -> str:
    """Return a hint for a folder that does not exist; the command line downloads a repository before it gets here."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\S+)?", str(path)):
        return f'check the path; for a repository on the Hub, Python has adaptkit.resolve_source("{path}")'
    return path_hint(path)


def _several(given: Any, one: tuple[type, ...]) -> Iterable[Any]:
    """Return the items of what may hold several; anything else is one item, which its check accepts or refuses."""
    is_one = isinstance(given, (*one, bytes, Mapping)) or not isinstance(given, Iterable)
    return (given,) if is_one else given


def _kind(given: Any) -> str:
    """Name what was given without showing it, since it may be a secret."""
    return "None" if given is None else type(given).__name__
