"""``encode_constants`` and ``decode_constants`` of ``reference``, compiled."""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.arrays import AnyValues, as_array, like
from adaptkit.numerics.kernels._cpu_memory import empty
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


def encode_constants(absmax: AnyValues, lookup: AnyValues, levels: AnyValues) -> tuple[AnyValues, AnyValues, float]:
    """See ``reference.encode_constants``."""
    constants, *tables = (np.ascontiguousarray(as_array(values)) for values in (absmax, lookup, levels))
    codes, nested = empty(constants.size, np.uint8), empty(-(-constants.size // GROUP), np.float32)
    offset = float(_encode(constants, *tables, codes, nested))
    return like(absmax, codes), like(absmax, nested), offset


@jit
def decode_groups(codes, nested, offset, levels, start, stop, absmax):
    """Decode constants ``start`` to ``stop`` - 1 into ``absmax``, (M,) float32; see ``reference.decode_constants``."""
    for group in range(start // GROUP, (stop + GROUP - 1) // GROUP):
        scale = nested[group]
        for i in range(max(start, group * GROUP), min(stop, (group + 1) * GROUP)):
            absmax[i] = levels[codes[i]] * scale + offset


def decode_constants(codes: AnyValues, nested_absmax: AnyValues, offset: float, levels: AnyValues) -> AnyValues:
    """See ``reference.decode_constants``."""
    flat, nested, table = (np.ascontiguousarray(as_array(values)) for values in (codes, nested_absmax, levels))
    absmax = empty(flat.size, np.float32)
    decode_groups(flat.reshape(-1), nested, np.float32(offset), table, 0, flat.size, absmax)
    return like(codes, absmax)
