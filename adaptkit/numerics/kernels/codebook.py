"""The sixteen levels of each 4-bit format, and the bounds that map a scaled weight to one of them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution scaled to [-1, 1], and an exact zero. Source: QLoRA (arXiv:2305.14314)."""

_FP4_MAGNITUDES = tuple(float(np.float32(twelfths / 12)) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))

FP4_LEVELS = (*_FP4_MAGNITUDES, *(0.0 - level for level in _FP4_MAGNITUDES))
"""Levels in the order of their codes: bit 3 is the sign, bits 0 to 2 select the magnitude; code 8 is a second zero.

Source: bitsandbytes."""


@dataclass(frozen=True)
class Codebook:
    """The levels of a 4-bit format.

    Attributes:
        levels: 16 float32 values within [-1, 1], the level of each code.
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.levels) != 16:
            raise ValueError(f"expected the 16 levels of a 4-bit code, found {len(self.levels)}")

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The 16 codes, sorted by level; for equal levels the lower code is first."""
        return tuple(sorted(range(16), key=lambda code: self.levels[code]))

    @cached_property
    def ascending(self) -> tuple[float, ...]:
        """The 16 levels in ascending order."""
        return tuple(self.levels[code] for code in self.order)

    @cached_property
    def bounds(self) -> tuple[float, ...]:
        """The 15 midpoints between levels, rounded to float32; a scaled weight equal to one gets the lower level."""
        levels = np.array(self.ascending, np.float32)
        return tuple(((levels[:-1] + levels[1:]) / np.float32(2)).tolist())

    @property
    def zero(self) -> int:
        """The code of a scaled weight of 0, which also fills the last byte if the number of weights is odd."""
        return self.order[sum(bound < 0 for bound in self.bounds)]


NF4 = Codebook(NF4_LEVELS)
FP4 = Codebook(FP4_LEVELS)
