"""The block-wise part of ``reference``, compiled.

The loops over the weights of a block have no branch and no table in memory: fifteen comparisons find a code, which the
compiler turns into vector instructions of whatever width the processor has. Trip counts are variables on purpose: a
loop with a constant one is unrolled before the vectorizer sees it. Tables are tuples, so that their entries are values
instead of memory that a store might change. See ``_cpu_decode`` for the way back from four bits.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from typing import Any

import numpy as np

from adaptkit.numerics.dtypes import BFLOAT16, Array, cast
from adaptkit.numerics.kernels import _reference_blocks as reference
from adaptkit.numerics.kernels._cpu_decode import (
    decode_by_pairs,
    decode_by_selection,
    decode_one_by_one,
    level_pairs,
    scratch_for,
)
from adaptkit.numerics.kernels._cpu_float import any_value, float_bits, magnitude, value
from adaptkit.numerics.kernels._jit import compiled, jit
from adaptkit.numerics.kernels._reference_blocks import TINY, Encoded
from adaptkit.numerics.kernels.codebook import Codebook

_TINY = np.float32(TINY)
_ROUND = np.float32(1.5 * 2**23)
"""Adding it to a small float32 leaves the nearest integer, ties to even, in the low bits of the sum."""


@jit
def find(scaled, bounds, entries):
    """Return ``entries[n]``, n being the number of bounds below a scaled weight; 15 bounds, 16 entries."""
    found = entries[0]
    found = entries[1] if bounds[0] < scaled else found
    found = entries[2] if bounds[1] < scaled else found
    found = entries[3] if bounds[2] < scaled else found
    found = entries[4] if bounds[3] < scaled else found
    found = entries[5] if bounds[4] < scaled else found
    found = entries[6] if bounds[5] < scaled else found
    found = entries[7] if bounds[6] < scaled else found
    found = entries[8] if bounds[7] < scaled else found
    found = entries[9] if bounds[8] < scaled else found
    found = entries[10] if bounds[9] < scaled else found
    found = entries[11] if bounds[10] < scaled else found
    found = entries[12] if bounds[11] < scaled else found
    found = entries[13] if bounds[12] < scaled else found
    found = entries[14] if bounds[13] < scaled else found
    return entries[15] if bounds[14] < scaled else found


@jit
def _absmax(x):
    largest = magnitude(x, 0)
    for i in range(x.size):
        largest = max(largest, magnitude(x, i))
    return any_value(x, largest)


@jit
def _measure_scale(x, absmax, block):
    """Store the largest magnitude of a block; return its reciprocal, which scales the weights."""
    largest = _absmax(x)
    absmax[block] = largest
    return np.float32(1) / max(largest, _TINY)


@compiled(fastmath={"reassoc"})
def _sum_moments(x, levels, moments):
    """Only these float64 sums may be reordered: that changes the float32 result by a last bit at most, and rarely."""
    xx, xl, ll = 0.0, 0.0, 0.0
    for i in range(x.size):
        weight, level = np.float64(x[i]), np.float64(levels[i])
        xx += weight * weight
        xl += weight * level
        ll += level * level
    moments[0], moments[1], moments[2] = xx, xl, ll


@jit
def _encode_4bit(flat, block_size, bounds, order, ascending, room, codes, absmax, moments):
    half = block_size // 2
    weights, levels = room
    for block in range(absmax.size):
        x = flat[block * block_size : (block + 1) * block_size]
        out = codes[block * half : (block + 1) * half]
        reciprocal = _measure_scale(x, absmax, block)
        for i in range(half):
            first, second = value(x, x[2 * i]), value(x, x[2 * i + 1])
            high = find(first * reciprocal, bounds, order)
            low = find(second * reciprocal, bounds, order)
            out[i] = (high << 4) | low
            if moments is not None:  # decided at compile time
                levels[2 * i] = find(first * reciprocal, bounds, ascending)
                levels[2 * i + 1] = find(second * reciprocal, bounds, ascending)
        if moments is not None:
            for i in range(block_size):
                weights[i] = value(x, x[i])
            _sum_moments(weights, levels, moments[block])


@compiled(fastmath={"reassoc", "contract"})
def sum_errors(moments, absmax):
    """See ``formats._blockwise.squared_errors``."""
    total = 0.0
    for block in range(absmax.size):
        a = np.float64(absmax[block])
        total += a * a * np.float64(moments[block, 1]) - 2 * a * np.float64(moments[block, 0])
    return total


def encode_4bit(weight: Array, block_size: int, book: Codebook, measure: bool = False) -> Encoded:
    """See ``reference.encode_4bit``, which also encodes a short last block: that is scaled by another rule."""
    flat = loadable(weight).reshape(-1)
    count, full = flat.size, flat.size // block_size
    codes, absmax, moments = _outputs((count + 1) // 2, np.uint8, -(-count // block_size), measure)
    bounds, ascending = (tuple(map(np.float32, values)) for values in (book.bounds, book.ascending))
    room = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    sums = None if moments is None else moments[:full]
    order = tuple(map(np.uint8, book.order))
    _encode_4bit(float_bits(flat), block_size, bounds, order, ascending, room, codes, absmax[:full], sums)
    if rest := count - full * block_size:
        last = reference.encode_4bit(flat[-rest:], block_size, book, measure)
        codes[full * block_size // 2 :], absmax[full:] = last[0], last[1]
        if moments is not None:
            moments[full:] = last[2]
    return codes, absmax, moments


def loadable(weight: Array) -> Array:
    """Return an array of a type that kernels can read, in row-major order."""
    flat = np.ascontiguousarray(weight)
    return flat if flat.dtype in (BFLOAT16, np.float16, np.float32) else cast(flat, np.float32)


def _outputs(count: int, dtype: Any, blocks: int, measure: bool) -> tuple[Array, Array, Array | None]:
    return np.empty(count, dtype), np.empty(blocks, np.float32), np.empty((blocks, 3), np.float32) if measure else None


def decode_4bit(
    codes: Array, absmax: Array, count: int, block_size: int, book: Codebook, dtype: np.dtype[Any]
) -> Array:
    """See ``reference.decode_4bit``."""
    out: Array = np.empty(count, dtype)
    packed, constants = np.ascontiguousarray(codes).reshape(-1), np.ascontiguousarray(absmax)
    full, table = count // block_size, level_pairs(book.levels)
    weights = full * block_size
    bits = float_bits(out)
    decode = decode_by_selection if bits.dtype.itemsize == 2 else decode_by_pairs
    decode(packed[: weights // 2], constants[:full], block_size, table, scratch_for(bits), bits[:weights])
    if weights < count:
        last = np.empty(-(-(count - weights) // 2) * 2, bits.dtype)
        decode_one_by_one(packed[weights // 2 :], constants[full:], block_size, table, last)
        bits[weights:] = last[: count - weights]
    return out
