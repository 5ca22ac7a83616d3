"""A share of an output's files, made by one of several processes or machines."""

from dataclasses import dataclass

from adaptkit.arguments import typed_fields
from adaptkit.errors import UsageError


@dataclass(frozen=True)
class Part:
    """One share of an output's files: the ``number``-th (from 1) of ``total``."""

    number: int
    total: int

    def __post_init__(self) -> None:
        typed_fields(self)
        if not 1 <= self.number <= self.total:
            raise UsageError(f"part {self.number}/{self.total}: not a share", hint="use 1/N to N/N")

    def holds(self, position: int) -> bool:
        """Return whether the file at a position (from 0) of the plan belongs to this share."""
        return position % self.total == self.number - 1
