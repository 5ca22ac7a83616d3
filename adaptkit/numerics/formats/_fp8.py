"""8-bit floats with a sign, four exponent bits and three fraction bits (E4M3), and a scale per block. Decoding only."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from adaptkit.numerics.arrays import Array, cast

LEVELS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""The value of each code, (256,) float32; two are NaN."""


def dequantize(codes: Array, scales: Array, block: tuple[int, int], first_row: int, dtype: np.dtype[Any]) -> Array:
    """Return level times scale in float32, rounded once to ``dtype``, for some rows of a matrix: (rows, columns).

    Args:
        codes: (rows, columns) uint8.
        scales: (ceil(all rows / block[0]), ceil(columns / block[1])) float32, those of the whole matrix.
        block: rows and columns that share a scale, at most those of the matrix.
        first_row: index of the first of the rows in the matrix.
        dtype: of the result.

    Source: ``weight_dequant`` of DeepSeek-V3 (arXiv:2412.19437), which multiplies and rounds in the same order.
    """
    rows, columns = codes.shape
    of_rows = scales[np.arange(first_row, first_row + rows) // block[0]]
    values = LEVELS[codes]
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what is not finite
        values *= np.repeat(of_rows, block[1], axis=1)[:, :columns] if of_rows.shape[1] > 1 else of_rows
    return cast(values, dtype)
