"""Microscaling 4-bit floats (MXFP4): E2M1 codes, of which 32 share a power of two. Decoding only."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from adaptkit.numerics.arrays import Array, cast

BLOCK = 32
"""Number of weights that share a scale."""
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each code: bit 3 is the sign."""
_BIAS, _NAN = 127, 255
_AT_A_TIME = 1 << 15
"""Number of bytes of codes decoded at a time, so that what is computed on the way stays in the cache."""


def dequantize(codes: Array, exponents: Array, dtype: np.dtype[Any]) -> Array:
    """Return level times 2 ** (exponent - 127) in rows of weights, (rows, columns).

    Args:
        codes: (rows, columns / 2) uint8, the earlier weight in the low half of a byte.
        exponents: (rows, columns / 32) uint8; 255 stands for NaN.
        dtype: of the result. bfloat16 holds every value exactly, but for those that are too large for it.

    Source: OCP Microscaling Formats (MX) Specification 1.0.
    """
    pairs, (rows, half) = _pairs(dtype), codes.shape
    found = np.empty((rows, half), pairs.dtype)
    step = max(1, _AT_A_TIME // half)
    for first in range(0, rows, step):
        here = slice(first, first + step)
        by_block = exponents[here, :, None].astype(np.uint16) << 8 | codes[here].reshape(
            -1, half * 2 // BLOCK, BLOCK // 2
        )
        found[here] = pairs.take(by_block).reshape(-1, half)
    return found.view(dtype)


@cache
def _pairs(dtype: np.dtype[Any]) -> Array:
    """Return the two values that each exponent and byte of codes stand for, as one element: (256 · 256,)."""
    exponents, codes = np.arange(256) - _BIAS, np.arange(256)
    values = np.ldexp(np.array(LEVELS), exponents[:, None])
    values[_NAN] = np.nan
    pairs = np.stack((values[:, codes & 15], values[:, codes >> 4]), axis=-1)
    return np.ascontiguousarray(cast(pairs, dtype)).reshape(-1).view(f"u{2 * dtype.itemsize}")
