"""Normalization of arguments: paths given as text, a single value where several are accepted, numbers of any type."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from adaptkit.errors import UsageError

AnyPath: TypeAlias = str | PathLike[str]
Options = TypeVar("Options")


def as_path(path: AnyPath, name: str = "path") -> Path:
    """Return the path as a ``Path``.

    Args:
        path: what a function was given.
        name: of the argument, for the message.

    Raises:
        UsageError: it is no path, or empty, which ``pathlib`` takes for the current folder.
    """
    text = os.fspath(path) if isinstance(path, (str, PathLike)) else None
    if not isinstance(text, str):
        raise UsageError(f"{name}: must be a path, found {_kind(path)}", hint="pass a str or a pathlib.Path")
    if not text:
        raise UsageError(f"{name}: the path is empty", hint="write . for the current folder")
    return Path(path)


def as_paths(paths: AnyPath | Iterable[AnyPath], name: str = "path") -> tuple[Path, ...]:
    """Return one path or several as a tuple; a str is one path, not a sequence of characters.

    Raises:
        UsageError: see ``as_path``.
    """
    return tuple(as_path(path, name) for path in _several(paths, (str, PathLike)))


def as_path_or_none(path: AnyPath | None, name: str = "path") -> Path | None:
    """Return the path as a ``Path``; None if it is None.

    Raises:
        UsageError: see ``as_path``.
    """
    return None if path is None else as_path(path, name)


def as_text(given: str, name: str = "text") -> str:
    """Return a text unchanged.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(given, str):
        raise UsageError(f"{name}: must be text, found {_kind(given)}", hint="pass a str")
    return given


def as_texts(given: str | Iterable[str], name: str = "text") -> tuple[str, ...]:
    """Return one text or several as a tuple.

    Raises:
        UsageError: something else was given.
    """
    return tuple(as_text(text, name) for text in _several(given, (str,)))


def check_flags(**given: bool) -> None:
    """Refuse arguments, by name, that are neither true nor false: a text such as "no" counts as true in Python.

    Raises:
        UsageError: names the argument.
    """
    for name, flag in given.items():
        try:
            _flag(flag)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name}: must be true or false, found {repr(flag)[:40]}", hint="pass a bool") from error


def _several(given: Any, one: tuple[type, ...]) -> Iterable[Any]:
    """Return the items of what may hold several; anything else is one item, which its check accepts or refuses."""
    is_one = isinstance(given, (*one, bytes, Mapping)) or not isinstance(given, Iterable)
    return (given,) if is_one else given


def _kind(given: Any) -> str:
    """Name what was given without showing it, since it may be a secret."""
    return "None" if given is None else type(given).__name__


def checked_options(given: Options | None, kind: type[Options], name: str = "options") -> Options:
    """Return the options that a function was given; the defaults if None.

    Args:
        given: what was given.
        kind: the class that is expected.
        name: of the argument, for the message.

    Raises:
        UsageError: something else was given, such as a dict.
    """
    if given is None:
        return kind()
    if not isinstance(given, kind):
        found = f"expected {kind.__name__}, found {type(given).__name__}"
        raise UsageError(f"{name}: {found}", hint=f"pass adaptkit.{kind.__name__}(...)")
    return given


def path_hint(path: AnyPath) -> str:
    """Return a hint for a path that does not exist."""
    of_a_shell = str(path).startswith("~")
    return "write the full path: only a shell expands ~" if of_a_shell else "check the path"


def folder_hint(path: AnyPath) -> str:
    """Return a hint for a folder that does not exist; the command line downloads a repository before it gets here."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\S+)?", str(path)):
        return f'check the path; for a repository on the Hub, Python has adaptkit.resolve_source("{path}")'
    return path_hint(path)


def typed_fields(options: Any) -> None:
    """Convert numbers, booleans and paths in a frozen dataclass of options to their fields' types, as the CLI does.

    Fields that hold other options, texts or mappings are checked.

    A manifest distinguishes 1 from 1.0, and cannot hold numpy's scalars.

    Raises:
        UsageError: a value has another type, is too large, or is a fraction where an integer is required.
    """
    for name, hint in get_type_hints(type(options)).items():
        given = getattr(options, name)
        kind, *others = get_args(hint) or (hint,)
        if given is not None and others == [type(None)] and isinstance(kind, type) and is_dataclass(kind):
            checked_options(given, kind, name)
        if hint == Path | None:
            object.__setattr__(options, name, as_path_or_none(given, name))
        if hint is str or (hint == str | None and given is not None):
            as_text(given, name)
        if get_origin(hint) is Mapping and not isinstance(given, Mapping):
            raise UsageError(f"{name}: must be a dict, found {_kind(given)}")
        if hint not in _CONVERT or (given is None and type(None) in others):
            continue
        convert, kind = _CONVERT[hint]
        try:
            object.__setattr__(options, name, convert(given))
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{name}: must be {kind}, found {repr(given)[:40]}") from error


def _whole(given: int) -> int:
    found = int(given)
    if found != given:
        raise ValueError(given)
    return found


def _flag(given: bool) -> bool:
    found = bool(given)
    if found != given:  # bool("no") is True
        raise ValueError(given)
    return found


def _reals(given: Any) -> tuple[float, ...]:
    return tuple(map(float, _several(given, (str, Real))))


_CONVERT: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_flag, "true or false"),
    int: (_whole, "a whole number"),
    int | None: (_whole, "a whole number"),
    float: (float, "a number"),
    float | None: (float, "a number"),
    tuple[float, ...]: (_reals, "numbers"),
}
"""Maps the type of a field to (conversion function, description for the error message)."""
