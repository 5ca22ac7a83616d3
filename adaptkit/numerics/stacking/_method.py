"""Definition of a stacking method, and settings that several have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from adaptkit.errors import UsageError
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spectrum import Spectrum
from adaptkit.settings import Settings, refuse, setting

Length = Literal["as given", "largest", "sum"]
"""The rank of a result if none is requested: that of the factors as the method returns them, the largest rank of any
adapter in any module, or the sum of the adapters' ranks in this module. The last two are limited to the numerical rank
of the result."""


@dataclass(frozen=True)
class NoOptions(Settings):
    """Options of a method that has none but the weights."""


def density(default: float, help: str = "Share of each adapter's elements that is kept.") -> Any:
    """Return the setting of a share of elements, which are kept."""
    return setting(help, default, above=0, at_most=1)


def seed() -> Any:
    """Return the setting of the seed of a random choice."""
    return setting("Seed of the random choice.", 0, at_least=0, at_most=2**63 - 1)


def count_kept(density: float, elements: int, module: str) -> int:
    """Return how many elements a density keeps, rounded down.

    Raises:
        UsageError: it keeps none; the message names the module.
    """
    kept = int(density * elements)
    if kept < 1:
        raise UsageError(f"{module}: density {density} keeps none of {elements} elements", hint="raise --density")
    return kept


@dataclass(frozen=True)
class ScaleOptions(Settings):
    """Options of a method that has a factor."""

    lambda_: float = setting("Factor of the result.", 1.0)

    def validate(self) -> None:
        """See ``Settings``."""
        if self.lambda_ == 0:
            refuse(self, "lambda_", "must be other than 0")


@dataclass(frozen=True)
class Method:
    """A stacking method.

    Attributes:
        combine: called with the weighted changes of one module, one per adapter in order, the options, and the module's
            name; returns the combined change. An adapter that does not change the module is passed with rank 0. The
            result is a LowRank; or a Spectrum, if the method itself orders the directions; or an (out, in) float64
            matrix, if it works on elements. It must depend only on its arguments: not on threads, other modules or a
            global random generator.
        source: paper and variant.
        options: class of its settings, which are command-line options and have defaults. A trailing underscore
            distinguishes a name from a Python keyword.
        length: rank of the result if none is requested.
    """

    combine: Callable[[Sequence[LowRank], Any, str], LowRank | Spectrum | Tensor]
    source: str
    options: type[Settings] = NoOptions
    length: Length = "sum"
