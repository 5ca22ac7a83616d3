"""The loop of ``numerics.rounding``, compiled: rounds column by column and spreads each error over later columns.

All products and sums are computed in one fixed order, so the codes depend neither on the machine nor on threads.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from typing import Any

import numpy as np

from adaptkit.numerics.arrays import Array
from adaptkit.numerics.kernels._cpu_calibration import LEVELS, best_code, nearest_code, scale_block, scratch_for
from adaptkit.numerics.kernels._jit import jit
from adaptkit.numerics.kernels._reference_blocks import GROUP, TINY

ROWS = 64
"""Rows processed together, for which the factor is read once."""

PANEL = 64
"""Columns whose errors are collected before the columns after them are updated."""

TILE = 128
"""Columns that are updated together. The factor's tile is copied: where its rows are a large power of two apart, they
displace each other from the caches."""


@jit
def _choose_scales(w, left, first_block, importance, block_size, levels, nested, offset, reach, room, codes, scales):
    """Choose the nested codes of the blocks of a row that begin in the panel, from the current weights."""
    x, _, lanes = room
    for start in range(left, min(left + PANEL, w.size), block_size):
        if start % block_size:
            return
        block = first_block + start // block_size
        group = nested[block // GROUP]
        h = importance[start : start + block_size]
        largest = scale_block(w[start : start + block_size], x)
        first = np.int64(codes[block])
        code = best_code(x, h, largest, levels, group, offset, first, reach, True, lanes)
        codes[block] = code
        scales[block] = np.float32(levels[code] * group) + offset


@jit
def _round_panel(w, left, right, first, scales, block_size, factor, codes, errors):
    """Round the columns of a row in a panel; ``first`` is the index of the row's first weight."""
    errors[:] = 0
    for j in range(left, right):
        scale = scales[(first + j) // block_size]
        if abs(scale) < np.float32(TINY):
            scale = np.float32(TINY)
        code = nearest_code(w[j] / scale)
        codes[j] = code
        error = (w[j] - LEVELS[code] * scale) / factor[j, j]
        errors[j - left] = error
        for k in range(j + 1, right):
            w[k] -= error * factor[j, k]


@jit
def _copy(part, tile):
    for j in range(part.shape[0]):
        for k in range(part.shape[1]):
            tile[j, k] = part[j, k]


@jit
def _spread(w, errors, tile):
    """Subtract the errors of a panel's columns, times their factors, from the columns of a tile."""
    for j in range(0, errors.size, 4):
        e0, e1, e2, e3 = errors[j], errors[j + 1], errors[j + 2], errors[j + 3]
        f0, f1, f2, f3 = tile[j], tile[j + 1], tile[j + 2], tile[j + 3]
        for k in range(w.size):
            w[k] = (((w[k] - e0 * f0[k]) - e1 * f1[k]) - e2 * f2[k]) - e3 * f3[k]


def scratch_for_rows(block_size: int) -> tuple[Any, Array, Array]:
    """Make scratch arrays for ``round_rows``."""
    return scratch_for(block_size), np.empty((ROWS, PANEL), np.float32), np.empty((PANEL, TILE), np.float32)


@jit
def round_rows(work, factor, importance, block_size, levels, nested, offset, reach, room, nested_codes, scales, codes):
    """Round every row of ``work``, which is overwritten.

    ``room`` is scratch from ``scratch_for_rows``. With ``reach`` > 0, each block chooses its nested code again when its
    first column is reached; blocks must not straddle rows then.
    """
    rows, columns = work.shape
    of_a_block, errors, tile = room
    for top in range(0, rows, ROWS):
        height = min(ROWS, rows - top)
        for left in range(0, columns, PANEL):
            right = min(left + PANEL, columns)
            for row in range(top, top + height):
                first = row * columns
                if reach > 0:
                    _choose_scales(
                        work[row], left, first // block_size, importance, block_size,
                        levels, nested, offset, reach, of_a_block, nested_codes, scales,
                    )  # fmt: skip
                _round_panel(work[row], left, right, first, scales, block_size, factor, codes[row], errors[row - top])
            for start in range(right, columns, TILE):
                stop = min(start + TILE, columns)
                _copy(factor[left:right, start:stop], tile)
                for row in range(top, top + height):
                    _spread(work[row, start:stop], errors[row - top], tile)
