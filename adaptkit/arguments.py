"""What callers give to functions: text for paths, one for several, numbers of any kind; a hint for a wrong path."""

from collections.abc import Callable, Iterable
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

from adaptkit.errors import UsageError

AnyPath: TypeAlias = str | PathLike[str]


def several(paths: AnyPath | Iterable[AnyPath]) -> tuple[Path, ...]:
    """The paths of a sequence, or of a single one: text is a sequence too, of letters."""
    return (Path(paths),) if isinstance(paths, (str, PathLike)) else tuple(map(Path, paths))


def optional(path: AnyPath | None) -> Path | None:
    """The path, if there is one."""
    return None if path is None else Path(path)


def texts(given: str | Iterable[str]) -> tuple[str, ...]:
    """The texts of a sequence, or a single one."""
    return (given,) if isinstance(given, str) else tuple(given)


def look_again(path: AnyPath) -> str:
    """A hint for a path that leads nowhere."""
    of_a_shell = str(path).startswith("~")
    return "write the full path: only a shell expands ~" if of_a_shell else "check the path"


def typed_fields(options: Any) -> None:
    """Give numbers, and yes or no, among options, a frozen dataclass, the types of their fields, as a command does.

    Manifests tell 1 from 1.0, and cannot tell what is numpy's.

    Raises:
        UsageError: one is something else, too large, or has a fraction where none can be.
    """
    for name, hint in get_type_hints(type(options)).items():
        given = getattr(options, name)
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
    if found != given:  # "no" would be true
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
"""By the type of a field, what gives a value that type, and what the value must be."""
