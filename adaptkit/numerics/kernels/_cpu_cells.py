"""Encoding by look-up, where the processor has AVX-512: 32 equal cells of scaled weights.

No cell holds more than one of the fifteen bounds, so tables give the cell's bound and how many lie below the cell, and
one comparison does the rest. ``_cpu_blocks`` compares with every bound.
"""

from functools import cache

import numpy as np

from adaptkit.compiled import written
from adaptkit.numerics.arrays import Array
from adaptkit.numerics.kernels._cpu_lookup import has_avx512
from adaptkit.numerics.kernels.codebook import Codebook

CHUNK = 16
"""Weights that are encoded at a time; a block is a multiple of it."""

CELLS = has_avx512("f")
"""Whether the processor for which numba compiles is known to look up in two vectors at once."""

SCALE, OFFSET = 15.0, 16.0
"""A scaled weight, at most 1 but for rounding, lies in the cell that is the whole part of its product and sum."""

encode_block = written("adaptkit.numerics.kernels._llvm_cells", "encode_block")


@cache
def cell_tables(book: Codebook) -> Array | None:
    """The tables of a format: 32 bounds and 32 counts of bounds below a cell, then codes and levels in their order.

    Returns:
        (6, 16) uint32, bounds and levels being the bits of float32. None where a cell would hold two bounds: fp4 tells
        its two zeros apart, so three of its bounds are 0.003 from each other.
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
