"""Weights as levels times the scales of groups, compiled; ``_reference_grouped`` documents the functions.

The loops over a row have no branch and no table in memory, so that they are vectorized; see ``_cpu_blocks``.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels._cpu_blocks import find, loadable
from adaptkit.numerics.kernels._cpu_float import any_value, float_bits, sortable_bits, value
from adaptkit.numerics.kernels._jit import compiled, jit
from adaptkit.numerics.kernels._reference_grouped import E4M3, INTEGERS, Rounding

_NORMAL, _TOP = (np.uint32(np.float32(number).view(np.uint32)) for number in (2.0**-6, 448.0))
"""The bits of the smallest normal number and the largest number of E4M3 as float32."""
_TO_DENORMAL = np.float32(1.5 * 2**14)
"""Adding it to a smaller float32 leaves the nearest multiple of 2^-9, ties to even, in the low bits of the sum."""


@jit
def _extremes(bits, size, height, low, high):
    low[:], high[:] = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for row in range(bits.shape[0]):
        for group in range(low.shape[1]):
            x = bits[row, group * size : min((group + 1) * size, bits.shape[1])]
            least, most = low[row // height, group], high[row // height, group]
            for i in range(x.size):
                sortable = sortable_bits(np.float32(any_value(x, x[i])).view(np.int32))
                least, most = min(least, sortable), max(most, sortable)
            low[row // height, group], high[row // height, group] = least, most
    for row in range(low.shape[0]):
        for group in range(low.shape[1]):
            low[row, group], high[row, group] = sortable_bits(low[row, group]), sortable_bits(high[row, group])


def group_extremes(rows: Array, size: int, height: int = 1) -> tuple[Array, Array]:
    """See ``reference.group_extremes``."""
    low, high = np.empty((2, -(-len(rows) // height), -(-rows.shape[1] // size)), np.float32)
    _extremes(float_bits(loadable(rows)), size, height, low.view(np.int32), high.view(np.int32))
    return low, high


@jit
def _round(scaled, rounding, codes, levels):
    """Store the codes of the nearest levels and, unless ``levels`` is None, the levels."""
    if rounding.kind == INTEGERS:
        lowest, highest, offset = rounding.lowest, rounding.highest, rounding.offset
        for i in range(scaled.size):
            level = min(max(np.rint(scaled[i]), lowest), highest)
            codes[i] = np.uint8(np.int32(level) + offset)
            if levels is not None:  # decided at compile time
                levels[i] = level
    elif rounding.kind == E4M3:
        for i in range(scaled.size):
            bits = np.float32(scaled[i]).view(np.uint32)
            sign = np.uint32(bits & np.uint32(0x80000000))
            size = min(np.uint32(bits ^ sign), _TOP)
            kept = np.uint32(size + np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
            shifted = np.float32(np.uint32(size).view(np.float32) + _TO_DENORMAL)
            code = np.uint32(kept - np.uint32(120 << 3))
            code = np.uint32(shifted.view(np.uint32) & np.uint32(15)) if size < _NORMAL else code
            codes[i] = np.uint8(code | (sign >> np.uint32(24)))
            if levels is not None:
                level = np.uint32(kept << np.uint32(20))
                denormal = np.float32(shifted - _TO_DENORMAL).view(np.uint32)
                level = denormal if size < _NORMAL else level
                levels[i] = np.uint32(level | sign).view(np.float32)
    else:
        for i in range(scaled.size):
            codes[i] = find(scaled[i], rounding.bounds, rounding.codes)
            if levels is not None:
                levels[i] = find(scaled[i], rounding.bounds, rounding.levels)


def nearest_codes(scaled: Array, rounding: Rounding) -> Array:
    """See ``reference.nearest_codes``."""
    out = np.empty(scaled.shape, np.uint8)
    _round(np.ascontiguousarray(scaled).reshape(-1), rounding, out.reshape(-1), None)
    return out


@compiled(fastmath={"reassoc"})
def _add_squares(x, decoded, moments):
    """Only these float64 sums may be reordered."""
    lost, squares = 0.0, 0.0
    for i in range(x.size):
        weight = np.float64(x[i])
        error = np.float64(decoded[i]) - weight
        lost += error * error
        squares += weight * weight
    moments[0] += lost
    moments[1] += squares


@jit
def _scale(x, scale, zero, weights, scaled):
    for i in range(x.size):
        weights[i] = value(x, x[i])
        scaled[i] = weights[i] / scale if zero is None else weights[i] / scale + zero


@jit
def _unscale(levels, scale, zero):
    for i in range(levels.size):
        levels[i] = levels[i] * scale if zero is None else (levels[i] - zero) * scale


@jit
def _store(codes, pairs, out):
    for i in range(out.size):
        out[i] = codes[2 * i] | (codes[2 * i + 1] << np.uint8(4)) if pairs else codes[i]


@jit
def _encode(bits, scales, zeros, size, height, rounding, pairs, room, codes, moments):
    weights, scaled, levels, found = room
    for row in range(bits.shape[0]):
        for group in range(scales.shape[1]):
            here = slice(group * size, min((group + 1) * size, bits.shape[1]))
            zero = None if zeros is None else zeros[row // height, group]
            _scale(bits[row, here], scales[row // height, group], zero, weights[here], scaled[here])
        _round(scaled, rounding, found, levels)
        _store(found, pairs, codes[row])
        if moments is not None:
            for group in range(scales.shape[1]):
                here = slice(group * size, min((group + 1) * size, bits.shape[1]))
                zero = None if zeros is None else zeros[row // height, group]
                _unscale(levels[here], scales[row // height, group], zero)
            _add_squares(weights, levels, moments)


def encode_groups(
    rows: Array,
    scales: Array,
    zeros: Array | None,
    size: int,
    height: int,
    rounding: Rounding,
    pairs: bool,
    measure: bool,
) -> tuple[Array, Array | None]:
    """See ``reference.encode_groups``."""
    columns = rows.shape[1]
    codes = np.empty((len(rows), columns // 2 if pairs else columns), np.uint8)
    weights, scaled, levels = np.empty((3, columns), np.float32)
    room = weights, scaled, levels if measure else None, np.empty(columns, np.uint8)
    moments = np.zeros(2) if measure else None
    numbers = None if zeros is None else zeros.astype(np.float32)
    _encode(float_bits(loadable(rows)), scales, numbers, size, height, rounding, pairs, room, codes, moments)
    return codes, moments


@jit
def _decode(codes, values, scales, zeros, size, out):
    for row in range(codes.shape[0]):
        for group in range(scales.shape[1]):
            scale = scales[row, group]
            zero = np.float32(0) if zeros is None else zeros[row, group]
            for i in range(group * size, (group + 1) * size):
                out[row, i] = (values[codes[row, i]] - zero) * scale


def decode_groups(codes: Array, values: Array, scales: Array, zeros: Array | None, out: Array) -> None:
    """See ``reference.decode_groups``."""
    numbers = None if zeros is None else zeros.astype(np.float32)
    _decode(codes, values, np.ascontiguousarray(scales), numbers, codes.shape[1] // scales.shape[1], out)
