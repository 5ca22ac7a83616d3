"""What callers give to the public functions: text for paths, one for several, 1 for 1.0; a hint for a wrong path."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TypeAlias

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
    return "write the whole path: only a shell knows what ~ stands for" if of_a_shell else "check the path"


def number(given: float | None) -> float | None:
    """The number, if there is one, as the command line gives it to manifests, where 1 and 1.0 are other bytes.

    Raises:
        UsageError: it is none, or too large for one.
    """
    try:
        return None if given is None else float(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{repr(given)[:40]}: must be a number ({error})") from error
