"""What a stacking method is, and how its options are checked."""

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
"""The rank of a result if nobody asks for one: that of the factors as the method returns them, the largest that any
adapter has in any module, or the sum of their ranks in this one; the last two at most what loses nothing."""


@dataclass(frozen=True)
class NoOptions:
    """A method that takes no options but the weights."""


def check_density(density: float) -> None:
    """Refuse a share that is not above 0 and at most 1.

    Raises:
        UsageError: says what it is.
    """
    if not 0 < density <= 1:
        raise UsageError(
            f"density: must be above 0 and at most 1, found {density}", hint="0.2 keeps a fifth of the elements"
        )


def check_lambda(factor: float) -> None:
    """Refuse a factor of the result that is 0 or not finite.

    Raises:
        UsageError: says what it is.
    """
    if not math.isfinite(factor) or factor == 0:
        raise UsageError(f"lambda: must be a finite number other than 0, found {factor}", hint="1 is the default")


def check_seed(seed: int) -> None:
    """Refuse a seed that is negative, has more than 63 bits, or is no whole number.

    Raises:
        UsageError: says what it is.
    """
    if not 0 <= seed < 2**63 or not isinstance(seed, Integral):
        raise UsageError(f"seed: must be a whole number from 0 to 2^63 - 1, found {seed}", hint="0 is the default")


def count_kept(density: float, elements: int, module: str) -> int:
    """How many elements a density keeps, rounded down.

    Raises:
        UsageError: none; names the module.
    """
    kept = int(density * elements)
    if kept < 1:
        raise UsageError(f"{module}: density {density} keeps none of {elements} elements", hint="raise --density")
    return kept


@dataclass(frozen=True)
class ScaleOptions:
    """Options of a method that needs no more than a factor.

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
        combine: (changes of one module, in order and weighted, one per adapter; options; the module's name) -> the
            change that stands for them. An adapter that leaves the module alone is there with rank 0. The result is in
            factors, or decomposed if the method says which directions come first, or a matrix (out, in) float64 if it
            works on elements. It depends on nothing else: no thread, no other module, no global generator.
        source: paper and variant.
        options: a frozen dataclass that checks itself; its fields are the options of the command line and have
            defaults. A trailing underscore keeps a name apart from a word of Python.
        length: of the result, if nobody says.
    """

    combine: Callable[[Sequence[LowRank], Any, str], LowRank | Spectrum | Tensor]
    source: str
    options: type[Any] = NoOptions
    length: Length = "sum"
