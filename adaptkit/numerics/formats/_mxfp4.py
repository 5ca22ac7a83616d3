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


def dequantize(codes: Array, exponents: Array, dtype: np.dtype[Any]) -> Array:
    """Return level times 2 ** (exponent - 127) in rows of weights, (rows, columns).

    Args:
        codes: (rows, columns / 2) uint8, the earlier weight in the low half of a byte.
        exponents: (rows, columns / 32) uint8; 255 stands for NaN.
        dtype: of the result. bfloat16 holds every value exactly, but for those that are too large for it.

    Source: OCP Microscaling Formats (MX) Specification 1.0.
    """
    indices = np.empty((*exponents.shape, BLOCK), np.uint16)
    by_block = codes.reshape(*exponents.shape, BLOCK // 2)
    indices[..., ::2], indices[..., 1::2] = by_block & 15, by_block >> 4
    indices |= exponents[..., None].astype(np.uint16) << 4
    found: Array = _values(dtype)[indices].reshape(len(codes), -1)
    return found


@cache
def _values(dtype: np.dtype[Any]) -> Array:
    """Return the value of each exponent and code: (256 · 16,)."""
    exponents = np.arange(256) - _BIAS
    values = np.ldexp(np.array(LEVELS), exponents[:, None])
    values[_NAN] = np.nan
    return cast(values.reshape(-1), dtype)
