"""The levels that a code can stand for, before the scale of its group: integers, floats of 4 and 8 bits, NF4.

    INT4    -8 .. 7         code q + 8
    INT8    -128 .. 127     code q in two's complement
    E2M1    s ee m          0 .5 1 1.5 2 3 4 6; bit 3 is the sign
    E4M3    s eeee mmm      bias 7, up to 448; subnormal steps of 2^-9; 0x7F and 0xFF are NaN

Source: OCP Microscaling Formats (MX) Specification 1.0 for the two float types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels import _reference_grouped as kinds
from adaptkit.numerics.kernels.codebook import NF4_LEVELS


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a type.

    Attributes:
        values: (2 ** bits,) float32, the level of each code; NaN if it stands for none.
    """

    values: Array

    def nearest(self, scaled: Array) -> Array:
        """Return the codes of the levels nearest to (count,) float32, not NaN; of the lower one where two are."""
        found: Array = self.codes[np.searchsorted(self.bounds, scaled)]
        return found

    @cached_property
    def codes(self) -> Array:
        """The codes in ascending order of their levels, each level once (n,) uint8."""
        _, first = np.unique(np.where(np.isnan(self.values), np.inf, self.values), return_index=True)
        found: Array = first[~np.isnan(self.values[first])].astype(np.uint8)
        return found

    @cached_property
    def levels(self) -> Array:
        """The levels in ascending order, each once (n,) float32."""
        found: Array = self.values[self.codes]
        return found

    @cached_property
    def bounds(self) -> Array:
        """The midpoints between levels (n - 1,) float32."""
        found: Array = (self.levels[:-1] + self.levels[1:]) / np.float32(2)
        return found

    @property
    def top(self) -> float:
        """Half the width of the levels, as readers of integers take it: what a group's largest magnitude becomes."""
        return float(self.levels[-1] - self.levels[0]) / 2


@dataclass(frozen=True, eq=False)
class StandardGrid(Grid):
    """The levels of a type that kernels know.

    Attributes:
        rounding: says it to the kernels.
    """

    rounding: kinds.Rounding

    def nearest(self, scaled: Array) -> Array:
        """See ``Grid``; of integers and E4M3, the even one where two are nearest."""
        from adaptkit.numerics.kernels import cpu  # here, since it loads numba

        return cpu.nearest_codes(scaled, self.rounding)


def _integers(bits: int, offset: int) -> StandardGrid:
    """Return the integers of so many bits, ``offset`` being added to one to get its code modulo 2 ** bits."""
    half = 1 << (bits - 1)
    values = np.roll(np.arange(-half, half, dtype=np.float32), offset - half)
    return StandardGrid(values, kinds.Rounding(kinds.INTEGERS, np.float32(-half), np.float32(half - 1), offset))


def _of_sixteen(levels: Sequence[float]) -> StandardGrid:
    grid = Grid(np.array(levels, np.float32))
    lacking = 16 - len(grid.codes)
    bounds = *grid.bounds, *[np.float32(np.inf)] * lacking
    codes, ascending = ((*known, *[known[-1]] * lacking) for known in (grid.codes, grid.levels))
    return StandardGrid(grid.values, kinds.Rounding(kinds.SIXTEEN, bounds=bounds, codes=codes, levels=ascending))


_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

INT4, INT8 = _integers(4, 8), _integers(8, 0)
NF4, E2M1 = _of_sixteen(NF4_LEVELS), _of_sixteen([*_MAGNITUDES, *(-level for level in _MAGNITUDES)])
E4M3 = StandardGrid(
    np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32), kinds.Rounding(kinds.E4M3)
)
