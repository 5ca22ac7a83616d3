"""A target: a program, and how it handles an adapter's or a checkpoint's files."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles


@dataclass(frozen=True)
class Finding:
    """One thing that a program refuses, gets wrong, or accepts only under a condition.

    Attributes:
        level: ``error`` if the program refuses the files or computes something else; ``warning`` if it needs a flag, or
            handles the files differently in some versions or cases.
        found: what was found, with the name of a tensor or key.
        effect: what the program does with it.
        change: what to do about it: a command, or a flag of the program.
    """

    level: Literal["error", "warning"]
    found: str
    effect: str
    change: str


@dataclass(frozen=True)
class Target:
    """A program.

    Attributes:
        reader: its name, and the version whose source the rules were read from.
        adapter: returns findings about an adapter; called with the base's shapes, or None if no base is given.
        checkpoint: returns findings about a checkpoint.
    """

    reader: str
    adapter: Callable[[AdapterFiles, BaseShapes | None], Iterable[Finding]]
    checkpoint: Callable[[CheckpointFiles], Iterable[Finding]]


def error_about(names: Collection[str], what: str, effect: str, change: str) -> Iterator[Finding]:
    """Yield an error about tensors or modules, whose names begin its ``found``; nothing if there are no names."""
    if names:
        yield Finding("error", f"{some(names)}: {what}" if what else some(names), effect, change)


def some(names: Collection[str]) -> str:
    """Return the first of some names in sorted order, and how many more there are."""
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
