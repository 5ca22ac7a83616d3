"""Microscaling 4-bit floats (MXFP4): E2M1 codes, of which 32 share a power of two.

Models are released in this format; adaptkit only decodes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptkit.numerics.arrays import Array, cast

BLOCK = 32
"""Number of weights that share a scale."""
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each code: bit 3 is the sign."""
_PAIRS = np.array([(LEVELS[byte & 15], LEVELS[byte >> 4]) for byte in range(256)], np.float32)
_BIAS, _NAN = 127, 255


def dequantize(codes: Array, exponents: Array, dtype: np.dtype[Any]) -> Array:
    """Return level times 2 ** (exponent - 127), which bfloat16 holds exactly, in rows of weights.

    Args:
        codes: (rows, columns / 2) uint8, the earlier weight in the low half of a byte.
        exponents: (rows, columns / 32) uint8; 255 stands for NaN.
        dtype: of the result, rounded once.

    Source: OCP Microscaling Formats (MX) Specification 1.0.
    """
    scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - _BIAS)
    scales[exponents == _NAN] = np.nan
    values = _PAIRS[codes].reshape(*exponents.shape, BLOCK)
    values *= scales[..., None]
    return cast(values.reshape(len(codes), -1), dtype)
