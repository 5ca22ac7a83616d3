"""Decoding of blocks of 4-bit codes, compiled.

16-bit weights are selected among the sixteen possible values of their block: a select is a vector instruction, and a
vector has many of them. Of 32-bit weights it has too few: their levels are looked up two at a time, and then scaled.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from functools import cache
from typing import Any

import numpy as np

from adaptkit.numerics.kernels._cpu_float import canonical_nan, rounded, value
from adaptkit.numerics.kernels._jit import inlined, jit

_PAIRS = 32
"""Bytes decoded at a time in a loop whose trip count is a constant: then it needs no code for what remains."""
_BLOCKS = 128
"""Blocks whose possible values are computed together."""
_SCALED = 64
"""Weights scaled at a time in a loop whose trip count is a constant."""
_LOOKED_UP = 16
"""Blocks looked up before they are scaled: what was just stored in small parts cannot be read at once as a vector."""


@inlined
def _pick(code, b0, b1, b2, b3, t):
    """Return the entry of sixteen whose number is in four bits of a code, given as masks from the lowest one up."""
    zero = np.uint8(0)
    bit0, bit1, bit2 = (code & b0) != zero, (code & b1) != zero, (code & b2) != zero
    s0 = t[1] if bit0 else t[0]
    s1 = t[3] if bit0 else t[2]
    s2 = t[5] if bit0 else t[4]
    s3 = t[7] if bit0 else t[6]
    s4 = t[9] if bit0 else t[8]
    s5 = t[11] if bit0 else t[10]
    s6 = t[13] if bit0 else t[12]
    s7 = t[15] if bit0 else t[14]
    u0 = s1 if bit1 else s0
    u1 = s3 if bit1 else s2
    u2 = s5 if bit1 else s4
    u3 = s7 if bit1 else s6
    v0 = u1 if bit2 else u0
    v1 = u3 if bit2 else u2
    return v1 if (code & b3) != zero else v0


@jit
def decode_one_by_one(codes, absmax, block_size, table, out):
    """Decode blocks of any size and with any constants, NaN too."""
    for i in range(codes.size):
        a = canonical_nan(absmax[2 * i // block_size])
        out[2 * i] = rounded(out, table[2 * codes[i]] * a)
        out[2 * i + 1] = rounded(out, table[2 * codes[i] + 1] * a)


@jit
def decode_by_selection(codes, absmax, block_size, table, room, out):
    """Select among the sixteen possible values of a block; entry k of block b is ``room[k * _BLOCKS + b]``."""
    unusual = block_size % (2 * _PAIRS) != 0
    for b in range(absmax.size):
        unusual |= absmax[b] != absmax[b]
    if unusual:
        decode_one_by_one(codes, absmax, block_size, table, out)
        return
    half = block_size // 2
    high0, high1, high2, high3 = np.uint8(16), np.uint8(32), np.uint8(64), np.uint8(128)
    low0, low1, low2, low3 = np.uint8(1), np.uint8(2), np.uint8(4), np.uint8(8)
    for first in range(0, absmax.size, _BLOCKS):
        constants = absmax[first : first + _BLOCKS]
        for k in range(16):
            level, row = table[2 * k + 1], room[k * _BLOCKS : k * _BLOCKS + constants.size]
            for b in range(constants.size):
                row[b] = rounded(out, level * constants[b])
        for b in range(constants.size):
            start = (first + b) * half
            values = (
                *(room[b], room[_BLOCKS + b], room[2 * _BLOCKS + b], room[3 * _BLOCKS + b]),
                *(room[4 * _BLOCKS + b], room[5 * _BLOCKS + b], room[6 * _BLOCKS + b], room[7 * _BLOCKS + b]),
                *(room[8 * _BLOCKS + b], room[9 * _BLOCKS + b], room[10 * _BLOCKS + b], room[11 * _BLOCKS + b]),
                *(room[12 * _BLOCKS + b], room[13 * _BLOCKS + b], room[14 * _BLOCKS + b], room[15 * _BLOCKS + b]),
            )
            for place in range(start, start + half, _PAIRS):
                packed, x = codes[place : place + _PAIRS], out[2 * place : 2 * place + 2 * _PAIRS]
                for i in range(_PAIRS):
                    x[2 * i] = _pick(packed[i], high0, high1, high2, high3, values)
                    x[2 * i + 1] = _pick(packed[i], low0, low1, low2, low3, values)


@jit
def decode_by_pairs(codes, absmax, block_size, table, room, out):
    """Look up the two levels of each byte, and scale them in place; ``room`` is not used."""
    half, pairs, found = block_size // 2, table.view(np.uint64), out.view(np.uint64)
    for first in range(0, absmax.size, _LOOKED_UP):
        constants = absmax[first : first + _LOOKED_UP]
        start, count = first * half, constants.size * half
        packed, levels = codes[start : start + count], found[start : start + count]
        for i in range(count):
            levels[i] = pairs[packed[i]]
        for b in range(constants.size):
            a, start = canonical_nan(constants[b]), (first + b) * block_size
            for done in range(0, block_size - _SCALED + 1, _SCALED):
                x = out[start + done : start + done + _SCALED]
                for i in range(_SCALED):
                    x[i] = rounded(x, value(x, x[i]) * a)
            for i in range(start + block_size // _SCALED * _SCALED, start + block_size):
                out[i] = rounded(out, value(out, out[i]) * a)


@cache
def level_pairs(levels: tuple[float, ...]) -> Any:
    """Return the levels of the two codes of each byte, (512,) float32."""
    table = np.array(levels, np.float32)
    return np.stack([np.repeat(table, 16), np.tile(table, 16)], axis=1).reshape(-1)


def scratch_for(bits: Any) -> Any:
    """Make the array ``room`` of ``decode_by_selection``, given its output; empty if that has 32 bits."""
    return np.empty(16 * _BLOCKS if bits.dtype.itemsize == 2 else 0, bits.dtype)
