"""The rounded addition in float32: where that gives the exact result for certain, and where it might not.

Rounding W + Δ to bfloat16 asks on which side of a middle between two numbers the sum lies, and float32 can tell unless
it is very near one. So the sum is found in float32, with a bound of its error, at half the cost; where a middle is
within the bound, about one time in ten thousand, the element is doubtful, and the caller computes it as the definition
says. The bits are those of the definition always. Source: the floating-point filters of Shewchuk, "Adaptive Precision
Floating-Point Arithmetic" (1997).

Everything is written so that NaN and infinity are doubtful: each test asks for what makes an element certain.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.compiled import INLINED, compiled, inlined, jit, overload
from adaptkit.numerics.kernels._cpu_float import any_value
from adaptkit.numerics.kernels._cpu_instructions import trailing_zeros, wide

CERTAIN, AMBIGUOUS, UNKNOWN = 0, 1, 2
"""What ``find_candidates`` says: the guess is the original, or is not enough to tell, or float32 cannot decide."""

_SIZE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
_UNIT = np.float32(1.03 * 2.0**-24)
"""A little more than the most by which one float32 operation is off, relative to its result."""


def cell(array):
    """How many float32 bit patterns go from one number of a 16-bit type to the next, where both are normal."""
    raise NotImplementedError


@overload(cell)
def _cell(array):
    size = np.uint32(1 << 16 if array.dtype.name == "uint16" else 1 << 13)
    return lambda array: size


def _limits(array):
    """What float32 can decide about a 16-bit type: least and greatest magnitude, the latter in bits, and reach.

    Between the two ``cell`` holds for a number and for its neighbours. A number must be ``reach`` times its error: then
    the error is less than a quarter of a cell, and no middle but that of its own cell is within it.
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
    """The bits, as a float32, of the nearest number of a 16-bit type; ties to even."""
    bits, step = _bits(number), cell(array)
    odd = np.uint32(np.uint32(bits & step) != 0)
    return np.uint32(np.uint32(bits + odd + (step >> np.uint32(1)) - np.uint32(1)) & ~np.uint32(step - np.uint32(1)))


def _narrowed(array, bits):
    """The bits of a 16-bit type for those of a float32 that it holds exactly as a normal number."""
    raise NotImplementedError


@overload(_narrowed)
def _narrowed_to(array, bits):
    if array.dtype.name == "uint16":
        return lambda array, bits: np.uint16(np.uint32(bits) >> np.uint32(16))

    def impl(array, bits):
        size = np.uint32(np.uint32(np.uint32(bits & _SIZE) - np.uint32(0x38000000)) >> np.uint32(13))
        return np.int16(np.uint16(size | (np.uint32(bits & _SIGN) >> np.uint32(16))))

    return impl


@jit
def trusted_range(array, error):
    """The bits of the least magnitude that can be trusted with an error, and how many there are from there on."""
    least, most, reach = _limits(array)
    first = min(_bits(max(error * reach, least)), most)
    return np.uint32(first), np.uint32(most - first)


@inlined
def _is_certain(array, number, error, least, span):
    """Whether all numbers within an error of this one round to the same."""
    bits = _bits(number)
    size = np.uint32(bits & _SIZE)
    half = np.uint32(cell(array) >> np.uint32(1))
    middle = _number((bits & ~np.uint32(cell(array) - np.uint32(1))) | half)
    far = abs(number - middle) > _plus_product(error, _number(size), _UNIT)
    return far & (np.uint32(size - least) <= span)


# The loops below first cut out the pieces that they work on: an index that is a sum might be negative, as far as the
# compiler knows, and then it makes no vectors.


@compiled(fastmath={"contract", "reassoc"})
def square_row(weight, row, left, count):
    """Σ W² of a piece of a row."""
    wide()
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
        How many values moved and Σ (result - W) · Δ, both without the doubtful ones, and how many these are.
    """
    old, new, changes = weight[row, left : left + count], out[row, left : left + count], delta[i, :count]
    moved, overlap, doubtful = np.int32(0), np.float32(0), np.int32(0)
    for j in range(count):
        before, change = any_value(old, old[j]), changes[j]
        total = before + change
        bits = _nearest(new, total)
        new[j] = _narrowed(new, bits)
        doubt = not _is_certain(new, total, error, least, span)
        doubts[j] = np.uint8(doubt)
        doubtful = np.int32(doubtful + np.int32(doubt))
        after = before if doubt else _number(bits)
        moved = np.int32(moved + np.int32(after != before))
        overlap = _plus_product(overlap, after - before, change)
    return moved, overlap, doubtful


@jit
def find_candidates(merged, row, left, count, delta, i, error, least, span, guess, guess_row, guess_left, states):
    """Guess the originals of a piece of a row that was merged, see ``reference._candidate``.

    For a positive result m the originals lie between two middles minus Δ: within ``half`` of ``centre`` - Δ. The guess
    must be inside and its neighbours outside, each by more than the error. For a negative one all signs are turned.
    """
    wide()
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
        # ``middle`` and the distances are rounded as numbers as large as ``back``, ``half`` as one as large as a cell.
        off = _plus_product(_plus_product(error, result, _UNIT * np.float32(2.0**-7)), abs(back), _UNIT)
        known = _is_certain(guesses, back, error, least, span) & (np.uint32(size - least) <= span)
        unique = known & (inside < half - off) & (outside > half + off)
        ambiguous = known & ((inside > half + off) | (outside < half - off))
        states[j] = np.uint8(CERTAIN) if unique else (np.uint8(AMBIGUOUS) if ambiguous else np.uint8(UNKNOWN))
        guesses[j] = _narrowed(guesses, place ^ sign)


@jit
def find_marks(marks, eights, count, words, found):
    """Find the elements of ``marks`` that are not zero.

    Few are, and at random, so a branch for each would often be guessed wrong; here there is one for each that is found.

    Args:
        marks: uint8, a multiple of eight of them.
        eights: the same memory as uint64.
        count: how many to look at.
        words: uint64, room for one in eight.
        found: int64, where to put their places; room for all.

    Returns:
        How many there are.
    """
    some, total = np.uint64(0), np.uint64(0)
    for j in range(count, (count + 7) & -8):
        marks[j] = 0
    for word in range(np.uint64((count + 7) >> 3)):
        words[some] = word
        some += np.uint64(eights[word] != 0)
    for n in range(some):
        bits = eights[words[n]]
        while bits:
            place = trailing_zeros(bits) >> np.uint64(3)
            found[total] = np.int64(np.uint64(8) * words[n] + place)
            total += np.uint64(1)
            bits &= ~(np.uint64(255) << np.uint64(np.uint64(8) * place))
    return np.int64(total)
