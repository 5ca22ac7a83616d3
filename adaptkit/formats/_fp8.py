"""8-bit floats with a sign, four exponent bits and three fraction bits (E4M3), and a scale per block. Decoding only."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from adaptkit.numerics.arrays import Array, cast

LEVELS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""The value of each code, (256,) float32; two are NaN."""
_AT_A_TIME = 1 << 16
"""Number of weights decoded at a time, so that what is computed on the way stays in the cache."""
_WORTH_A_TABLE = 1 << 13
"""Number of weights with one scale for which it is faster to round 256 products, and look these up."""


def dequantize(codes: Array, scales: Array, block: tuple[int, int], first_row: int, out: Array) -> None:
    """Write level times scale in float32, rounded once to the dtype of ``out``, for some rows of a matrix.

    Args:
        codes: (rows, columns) uint8.
        scales: (blocks that the rows lie in, ceil(columns / block[1])) float32.
        block: rows and columns that share a scale, at most those of the matrix.
        first_row: index of the first of the rows in its block.
        out: (rows, columns), of any float dtype.

    Source: ``weight_dequant`` of DeepSeek-V3 (arXiv:2412.19437), which multiplies and rounds in the same order.
    """
    (rows, columns), (height, width) = codes.shape, block
    by_table = height * width >= _WORTH_A_TABLE
    step, start = max(1, _AT_A_TIME // (width if by_table else columns)), 0
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        while start < rows:
            index, inside = divmod(first_row + start, height)
            stop = min(rows, start + step, start + height - inside if by_table else rows)
            if by_table:
                _look_up(codes[start:stop], scales[index], width, out[start:stop])
            else:
                of_rows = scales[np.arange(first_row + start, first_row + stop) // height]
                _multiply(codes[start:stop], of_rows, width, out[start:stop])
            start = stop


def _multiply(codes: Array, scales: Array, width: int, out: Array) -> None:
    """Decode rows that have scales of their own, one for each ``width`` columns."""
    values: Array = LEVELS.take(codes)
    values *= np.repeat(scales, width, axis=1)[:, : codes.shape[1]] if scales.shape[1] > 1 else scales
    out[:] = values


def _look_up(codes: Array, scales: Array, width: int, out: Array) -> None:
    """Decode rows that share their scales, one for each ``width`` columns."""
    tables = cast(LEVELS * scales[:, None], out.dtype)
    for table, first in zip(tables, range(0, codes.shape[1], width), strict=True):
        columns = slice(first, first + width)
        out[:, columns] = table.take(codes[:, columns])
