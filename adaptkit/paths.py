"""Paths as callers of the public functions give them: text, or what stands for a path."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TypeAlias

AnyPath: TypeAlias = str | PathLike[str]


def several(paths: AnyPath | Iterable[AnyPath]) -> tuple[Path, ...]:
    """The paths of a sequence, or of a single one: text is a sequence too, of letters."""
    return (Path(paths),) if isinstance(paths, (str, PathLike)) else tuple(map(Path, paths))


def optional(path: AnyPath | None) -> Path | None:
    """The path, if there is one."""
    return None if path is None else Path(path)
