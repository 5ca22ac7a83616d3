"""``encode_constants`` and ``decode_constants`` of ``reference``, compiled."""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels._jit import jit
from adaptkit.numerics.kernels._reference_blocks import GROUP


@jit
def _encode(absmax, lookup, levels, codes, nested):
    one, half, top = np.float32(1), np.float32(0.5), np.float32(65535)
    total = 0.0
    for i in range(absmax.size):
        total += absmax[i]
    offset = np.float32(total / absmax.size)
    for group in range(nested.size):
        constants = absmax[group * GROUP : (group + 1) * GROUP]
        out = codes[group * GROUP : (group + 1) * GROUP]
        largest = np.float32(0)
        for i in range(constants.size):
            largest = max(largest, abs(constants[i] - offset))
        nested[group] = largest
        if largest == 0:
            out[:] = 0
            continue
        reciprocal = one / largest
        for i in range(constants.size):
            apart = constants[i] - offset
            scaled = apart / largest if np.isinf(reciprocal) else min(max(apart * reciprocal, -one), one)
            code = lookup[np.int32((scaled + one) * half * top + half)]
            while levels[code] * largest + offset < 0:
                code += 1
            out[i] = code
    return offset


def encode_constants(absmax: Array, lookup: Array, levels: Array) -> tuple[Array, Array, float]:
    """See ``reference.encode_constants``."""
    codes, nested = np.empty(absmax.size, np.uint8), np.empty(-(-absmax.size // GROUP), np.float32)
    offset = float(_encode(*map(np.ascontiguousarray, (absmax, lookup, levels)), codes, nested))
    return codes, nested, offset


@jit
def decode_groups(codes, nested, offset, levels, start, stop, absmax):
    """Decode constants ``start`` to ``stop`` - 1 into ``absmax``, (M,) float32; see ``reference.decode_constants``."""
    for group in range(start // GROUP, (stop + GROUP - 1) // GROUP):
        scale = nested[group]
        for i in range(max(start, group * GROUP), min(stop, (group + 1) * GROUP)):
            absmax[i] = levels[codes[i]] * scale + offset


def decode_constants(codes: Array, nested_absmax: Array, offset: float, levels: Array) -> Array:
    """See ``reference.decode_constants``."""
    flat, nested, table = map(np.ascontiguousarray, (codes.reshape(-1), nested_absmax, levels))
    absmax: Array = np.empty(flat.size, np.float32)
    decode_groups(flat, nested, np.float32(offset), table, 0, flat.size, absmax)
    return absmax
