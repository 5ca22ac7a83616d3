"""The rounded addition in float32, with a test that tells where the result is certain to be exact.

Rounding W + Δ to bfloat16 depends on which side of a midpoint between two bfloat16 numbers the sum lies, which float32
can tell unless the sum is very close to one. So the sum is computed in float32, with an error bound, at half the cost.
Where a midpoint is within the bound, about once in ten thousand, the element is doubtful, and the caller computes it
as ``reference`` defines it. So the bits are always those of the definition. Source: the floating-point filters of
Shewchuk, "Adaptive Precision Floating-Point Arithmetic" (1997).

All tests check what makes an element certain, so that NaN and infinity are doubtful.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.kernels._cpu_double import narrow
from adaptkit.numerics.kernels._cpu_float import any_value
from adaptkit.numerics.kernels._jit import INLINED, compiled, inlined, jit, overload

CERTAIN, AMBIGUOUS, UNKNOWN = 0, 1, 2
"""States of a guess: it is the original, it may not be the original, or float32 cannot tell which of the two."""

_SIZE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
_UNIT = np.float32(1.03 * 2.0**-24)
"""Slightly more than the maximum relative error of one float32 operation."""


def cell(array):
    """Return the distance in float32 bit patterns between neighbouring normal numbers of a 16-bit type."""
    raise NotImplementedError


@overload(cell)
def _cell(array):
    size = np.uint32(1 << 16 if array.dtype.name == "uint16" else 1 << 13)
    return lambda array: size


def _limits(array):
    """Return the range in which float32 can decide for a 16-bit type: least magnitude, bits of the greatest, and reach.

    In this range ``cell`` is correct for a number and its neighbours. A number must also be at least ``reach`` times
    its error: then the error is less than a quarter of a cell, and only the midpoint of its own cell can be within it.
    """
    raise NotImplementedError


@overload(_limits)
def _limits_of(array):
    least, most, reach = (
        (2.0**-100, 2.0**126, 2.0**11) if array.dtype.name == "uint16" else (2.0**-13, 2.0**15, 2.0**14)
    )
    limits = np.float32(least), np.float32(most).view(np.uint32), np.float32(reach)
    return lambda array: limits


@inlined
def _bits(number):
    return np.float32(number).view(np.uint32)


@inlined
def _number(bits):
    return np.uint32(bits).view(np.float32)


@compiled(fastmath={"contract", "reassoc"}, **INLINED)
def _plus_product(total, x, y):
    return total + x * y


@inlined
def _nearest(array, number):
    """Return the float32 bits of the nearest number of a 16-bit type; ties to even."""
    bits, step = _bits(number), cell(array)
    odd = np.uint32(np.uint32(bits & step) != 0)
    return np.uint32(np.uint32(bits + odd + (step >> np.uint32(1)) - np.uint32(1)) & ~np.uint32(step - np.uint32(1)))


@jit
def trusted_range(array, error):
    """Return the bits of the least magnitude that can be decided with an error, and the length of the range in bits."""
    least, most, reach = _limits(array)
    first = min(_bits(max(error * reach, least)), most)
    return np.uint32(first), np.uint32(most - first)


@inlined
def _is_certain(array, number, error, least, span):
    """Return whether all numbers within ``error`` of this one round to the same number."""
    bits = _bits(number)
    size = np.uint32(bits & _SIZE)
    half = np.uint32(cell(array) >> np.uint32(1))
    middle = _number((bits & ~np.uint32(cell(array) - np.uint32(1))) | half)
    far = abs(number - middle) > _plus_product(error, _number(size), _UNIT)
    return far & (np.uint32(size - least) <= span)


# The loops below first slice the pieces that they work on: the compiler does not vectorize an index that is a sum,
# which might be negative.


@compiled(fastmath={"contract", "reassoc"})
def square_row(weight, row, left, count):
    """Return Σ W² of a piece of a row."""
    values = weight[row, left : left + count]
    total = 0.0
    for j in range(count):
        number = np.float64(any_value(values, values[j]))
        total += number * number
    return total


@jit
def round_row(weight, row, left, count, delta, i, error, least, span, out, doubts):
    """Add row i of ``delta``, (rows, TILE) float32, to a piece of a row of a weight.

    Returns:
        The number of values that changed and Σ (result - W) · Δ, both without the doubtful ones, and the number of
        doubtful ones.
    """
    old, new, changes = weight[row, left : left + count], out[row, left : left + count], delta[i, :count]
    moved, overlap, doubtful = np.int32(0), np.float32(0), np.int32(0)
    for j in range(count):
        before, change = any_value(old, old[j]), changes[j]
        total = before + change
        bits = _nearest(new, total)
        new[j] = narrow(new, _number(bits))
        doubt = not _is_certain(new, total, error, least, span)
        doubts[j] = np.uint8(doubt)
        doubtful = np.int32(doubtful + np.int32(doubt))
        after = before if doubt else _number(bits)
        moved = np.int32(moved + np.int32(after != before))
        overlap = _plus_product(overlap, after - before, change)
    return moved, overlap, doubtful


@jit
def find_candidates(merged, row, left, count, delta, i, error, least, span, guess, guess_row, guess_left, states):
    """Guess the originals of a piece of a merged row, see ``reference._candidate``; write the state of each guess.

    The originals of a positive result lie between its two midpoints minus Δ, that is within ``half`` of ``centre`` - Δ.
    The guess must be inside and its neighbours outside, each by more than the error. For a negative result all signs
    are flipped.
    """
    results, changes = merged[row, left : left + count], delta[i, :count]
    guesses = guess[guess_row, guess_left : guess_left + count]
    step = cell(merged)
    for j in range(count):
        bits = _bits(any_value(results, results[j]))
        sign, size = np.uint32(bits & _SIGN), np.uint32(bits & _SIZE)
        result, change = _number(size), _number(_bits(changes[j]) ^ sign)
        low, high = _number(size - (step >> np.uint32(1))), _number(size + (step >> np.uint32(1)))
        centre = (low + high) * np.float32(0.5)
        half = high - centre
        back, middle = result - change, centre - change
        place = _nearest(guesses, back)
        inside = abs(_number(place) - middle)
        outside = min(abs(_number(place + step) - middle), abs(_number(place - step) - middle))
        # ``middle`` and the distances have rounding errors relative to ``back``, ``half`` one relative to a cell.
        off = _plus_product(_plus_product(error, result, _UNIT * np.float32(2.0**-7)), abs(back), _UNIT)
        known = _is_certain(guesses, back, error, least, span) & (np.uint32(size - least) <= span)
        unique = known & (inside < half - off) & (outside > half + off)
        ambiguous = known & ((inside > half + off) | (outside < half - off))
        states[j] = np.uint8(CERTAIN) if unique else (np.uint8(AMBIGUOUS) if ambiguous else np.uint8(UNKNOWN))
        guesses[j] = narrow(guesses, _number(place ^ sign))


@jit
def find_nonzero(marks, eights, count, words, found):
    """Find the nonzero elements of ``marks``.

    They are few and at random places, so a branch per element would often be mispredicted; here there is none.

    Args:
        marks: uint8, a multiple of eight in length.
        eights: the same memory as uint64.
        count: number of elements to search.
        words: int64, scratch, an eighth of the length and one more.
        found: int64, receives the indices; as long as ``marks`` and one more.

    Returns:
        The number of nonzero elements.
    """
    some, total = 0, 0
    for j in range(count, (count + 7) & -8):
        marks[j] = 0
    for word in range((count + 7) >> 3):
        words[some] = word
        some += eights[word] != 0
    for n in range(some):
        for j in range(8 * words[n], 8 * words[n] + 8):
            found[total] = j
            total += marks[j] != 0
    return total
