"""The levels that a code can stand for, before the scale of its group: integers, floats of 4 and 8 bits, NF4.

    INT4    -8 .. 7         code q + 8
    INT8    -128 .. 127     code q in two's complement
    E2M1    s ee m          0 .5 1 1.5 2 3 4 6; bit 3 is the sign
    E4M3    s eeee mmm      bias 7, up to 448; subnormal steps of 2^-9; 0x7F and 0xFF are NaN

Source: OCP Microscaling Formats (MX) Specification 1.0 for the two float types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels.codebook import NF4_LEVELS

_BATCH = 1 << 16
"""Number of values rounded at a time, so that what is computed on the way stays in the cache."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a type.

    Attributes:
        values: (2 ** bits,) float32, the level of each code; NaN if it stands for none.
        nearest: maps (count,) float32, not NaN, to (count,) uint8, the code of the nearest level; values beyond the
            levels get the outermost one.
    """

    values: Array
    nearest: Callable[[Array], Array]

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


def _integers(bits: int) -> Grid:
    half = 1 << (bits - 1)
    values = np.arange(-half, half, dtype=np.float32)
    if bits == 8:
        values = np.roll(values, half)

    def nearest(scaled: Array) -> Array:
        rounded = np.clip(np.rint(scaled), -half, half - 1).astype(np.int8)
        return rounded.view(np.uint8) if bits == 8 else (rounded + np.int8(half)).view(np.uint8)

    return Grid(values, nearest)


def grid_of(values: Array) -> Grid:
    """Return the grid of any levels: (2 ** bits,) float32, NaN for codes that stand for none."""

    def nearest(scaled: Array) -> Array:
        found: Array = grid.codes[np.searchsorted(grid.bounds, scaled)]
        return found

    grid = Grid(values, nearest)
    return grid


def _of_sixteen(levels: Sequence[float]) -> Grid:
    def nearest(scaled: Array) -> Array:
        from adaptkit.numerics.kernels.cpu import nearest_codes  # here, since it loads numba

        return nearest_codes(scaled, grid.bounds, grid.codes)

    grid = Grid(np.array(levels, np.float32), nearest)
    return grid


def _nearest_e4m3(scaled: Array) -> Array:
    import torch  # here, since it is large; ml_dtypes takes ten times as long

    codes, top = np.empty(scaled.shape, np.uint8), np.float32(E4M3.top)
    for first in range(0, scaled.size, _BATCH):
        clipped = np.clip(scaled[first : first + _BATCH], -top, top)
        codes[first : first + _BATCH] = torch.from_numpy(clipped).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return codes


_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

INT4, INT8 = _integers(4), _integers(8)
NF4, E2M1 = _of_sixteen(NF4_LEVELS), _of_sixteen([*_MAGNITUDES, *(-level for level in _MAGNITUDES)])
E4M3 = Grid(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32), _nearest_e4m3)
