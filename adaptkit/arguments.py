"""Normalization of arguments: paths given as text, a single value where several are accepted, numbers of any type."""

import re
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args, get_type_hints

from adaptkit.errors import UsageError

AnyPath: TypeAlias = str | PathLike[str]
Options = TypeVar("Options")


def as_paths(paths: AnyPath | Iterable[AnyPath]) -> tuple[Path, ...]:
    """Return one path or several as a tuple; a str is one path, not a sequence of characters."""
    return (Path(paths),) if isinstance(paths, (str, PathLike)) else tuple(map(Path, paths))


def as_path_or_none(path: AnyPath | None) -> Path | None:
    """Return the path as a ``Path``; None if it is None."""
    return None if path is None else Path(path)


def as_texts(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return one text or several as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given)


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
    """Convert the numbers and booleans in a frozen dataclass of options to their fields' types, as the CLI does.

    Fields that hold other options are checked.

    A manifest distinguishes 1 from 1.0, and cannot hold numpy's scalars.

    Raises:
        UsageError: a value has another type, is too large, or is a fraction where an integer is required.
    """
    for name, hint in get_type_hints(type(options)).items():
        given = getattr(options, name)
        kind, *others = get_args(hint) or (hint,)
        if given is not None and others == [type(None)] and isinstance(kind, type) and is_dataclass(kind):
            checked_options(given, kind, name)
        if hint not in _CONVERT or (given is None and hint not in (bool, int, float)):
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
    return (float(given),) if isinstance(given, str | Real) else tuple(map(float, given))


_CONVERT: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_flag, "true or false"),
    int: (_whole, "a whole number"),
    int | None: (_whole, "a whole number"),
    float: (float, "a number"),
    float | None: (float, "a number"),
    tuple[float, ...]: (_reals, "numbers"),
}
"""Maps the type of a field to (conversion function, description for the error message)."""
