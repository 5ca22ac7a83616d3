"""What a target is: a program, and what it makes of an adapter's or a checkpoint's files."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles


@dataclass(frozen=True)
class Finding:
    """One thing that a program refuses, gets wrong, or takes on a condition.

    Attributes:
        level: ``error`` if it refuses the files or computes something else, ``warning`` if it needs a flag or differs.
        found: what, with the name of a tensor or of a key.
        effect: what the program does with it.
        change: what to do about it: a command, or the program's flag.
    """

    level: Literal["error", "warning"]
    found: str
    effect: str
    change: str


@dataclass(frozen=True)
class Target:
    """A program.

    Attributes:
        reader: its name and the version whose source the rules were read from.
        adapter: what it makes of an adapter, with the base's shapes if those are known.
        checkpoint: what it makes of a checkpoint.
    """

    reader: str
    adapter: Callable[[AdapterFiles, BaseShapes | None], Iterable[Finding]]
    checkpoint: Callable[[CheckpointFiles], Iterable[Finding]]


def some(names: Collection[str]) -> str:
    """One of some names, the first in their order, and how many more there are."""
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
