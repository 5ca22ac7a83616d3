"""Encoding by table look-up on processors with AVX-512: the range of scaled weights is cut into 32 equal cells.

No cell contains more than one of the fifteen bounds. So tables give the bound in a cell and the number of bounds below
the cell, and one comparison gives the code. ``_cpu_blocks`` compares with every bound instead.
"""

from functools import cache

import numpy as np

from adaptkit.compiled import lazy_intrinsic
from adaptkit.numerics.arrays import Array
from adaptkit.numerics.kernels._cpu_lookup import has_avx512
from adaptkit.numerics.kernels.codebook import Codebook

CHUNK = 16
"""Number of weights encoded at a time; the block size must be a multiple of it."""

CELLS = has_avx512("f")
"""Whether numba's target processor can look up in two vectors at once (vpermi2)."""

SCALE, OFFSET = 15.0, 16.0
"""The cell of a scaled weight x, which lies in [-1, 1] but for rounding, is the integer part of x · SCALE + OFFSET."""

encode_block = lazy_intrinsic("adaptkit.numerics.kernels._llvm_cells", "encode_block")


@cache
def cell_tables(book: Codebook) -> Array | None:
    """Return the tables of a format: for each of 32 cells its bound and the number of bounds below, codes, levels.

    Returns:
        (6, 16) uint32, in which bounds and levels are the bits of float32, and codes and levels are sorted by level.
        None if the processor lacks the instruction, or if a cell would contain two bounds, as for fp4: it
        distinguishes two zeros, so three of its bounds are only 0.003 apart.
    """
    bounds = np.array(book.bounds, np.float32)
    cell_of = np.floor(bounds.astype(np.float64) * SCALE + OFFSET).astype(int)
    if not CELLS or np.any(np.diff(cell_of) == 0):
        return None
    cells = np.full(32, np.inf, np.float32)
    cells[cell_of] = bounds
    below = np.searchsorted(cell_of, np.arange(32))
    parts = cells.view(np.uint32), below, book.order, np.array(book.ascending, np.float32).view(np.uint32)
    return np.concatenate([np.asarray(part, np.uint32) for part in parts]).reshape(6, 16)
