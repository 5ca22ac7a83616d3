"""Definition of a stacking method, and checks of its options."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from adaptkit.errors import UsageError
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spectrum import Spectrum

Length = Literal["as given", "largest", "sum"]
"""The rank of a result if none is requested: that of the factors as the method returns them, the largest rank of any
adapter in any module, or the sum of the adapters' ranks in this module. The last two are limited to the numerical rank
of the result."""


@dataclass(frozen=True)
class NoOptions:
    """Options of a method that has none but the weights."""


def check_density(density: float) -> None:
    """Check that a share is above 0 and at most 1.

    Raises:
        UsageError: it is not.
    """
    if not 0 < density <= 1:
        raise UsageError(
            f"density: must be above 0 and at most 1, found {density}", hint="0.2 keeps a fifth of the elements"
        )


def check_lambda(factor: float) -> None:
    """Check that a factor of the result is finite and not 0.

    Raises:
        UsageError: it is not.
    """
    if not math.isfinite(factor) or factor == 0:
        raise UsageError(f"lambda: must be a finite number other than 0, found {factor}", hint="1 is the default")


def check_seed(seed: int) -> None:
    """Check that a seed is a whole number from 0 to 2^63 - 1.

    Raises:
        UsageError: it is not.
    """
    if not 0 <= seed < 2**63 or not isinstance(seed, Integral):
        raise UsageError(f"seed: must be a whole number from 0 to 2^63 - 1, found {seed}", hint="0 is the default")


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
class ScaleOptions:
    """Options of a method that has only a factor.

    Attributes:
        lambda_: factor of the result.
    """

    lambda_: float = 1.0

    def __post_init__(self) -> None:
        check_lambda(self.lambda_)


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
        options: a frozen dataclass that validates itself; its fields are command-line options and have defaults. A
            trailing underscore distinguishes a name from a Python keyword.
        length: rank of the result if none is requested.
    """

    combine: Callable[[Sequence[LowRank], Any, str], LowRank | Spectrum | Tensor]
    source: str
    options: type[Any] = NoOptions
    length: Length = "sum"
