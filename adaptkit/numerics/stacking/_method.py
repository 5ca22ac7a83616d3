"""What a stacking method is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adaptkit.numerics.lora import LowRank


@dataclass(frozen=True)
class Method:
    """A stacking method.

    Attributes:
        combine: the weighted changes of one module, in order -> one change.
        source: paper and variant.
    """

    combine: Callable[[Sequence[LowRank]], LowRank]
    source: str
