"""Rounding float64 once to the three float types inside compiled loops, without a branch, as in ``_cpu_float``.

As there, the integer type of an array determines the float type: uint16 bfloat16, int16 float16, uint32 float32.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.kernels._jit import inlined, overload

_MANTISSA = {"uint16": 7, "int16": 10, "uint32": 23}
_LEAST_EXPONENT = {"uint16": -126, "int16": -14, "uint32": -126}
_INFINITY = {"uint16": 0x7F80, "int16": 0x7C00, "uint32": 0x7F800000}

_EXPONENT = np.int64(0x7FF << 52)
_SIGN = np.int64(-1 << 63)


def rounded_once(array, number):
    """Return the bits of a float64 rounded once to an array's type, ties to even; NaN gives NaN or infinity."""
    raise NotImplementedError


@overload(rounded_once)
def _rounded_once(array, number):
    mantissa, least = _MANTISSA[array.dtype.name], _LEAST_EXPONENT[array.dtype.name]
    floor = np.int64((least + 1023) << 52)
    step = np.int64(((52 - mantissa) << 52) | (1 << 51))

    # Adding and subtracting 1.5 · 2^(52 + q) leaves a multiple of 2^q, rounded by the processor to nearest, ties to
    # even; q is the exponent of the last place. Beyond 2^977 that fails, but such numbers overflow all three types.
    def impl(array, number):
        bits = np.float64(number).view(np.int64)
        magic = np.int64(max(bits & _EXPONENT, floor) + step).view(np.float64)
        multiple = np.float64((number + magic) - magic)
        signed = np.int64(multiple.view(np.int64) | (bits & _SIGN)).view(np.float64)  # restores the sign of a zero
        return narrow(array, np.float32(signed))

    return impl


def narrow(array, number):
    """Return the bits, in an array's type, of a float32 that the type represents exactly or that overflows it."""
    raise NotImplementedError


@overload(narrow)
def _narrow_to(array, number):
    if array.dtype.name == "uint16":
        return lambda array, number: np.uint16(np.float32(number).view(np.uint32) >> np.uint32(16))
    if array.dtype.name == "uint32":
        return lambda array, number: np.float32(number).view(np.uint32)
    return lambda array, number: _narrow_float16(number)


@inlined
def _narrow_float16(number):
    bits = np.float32(number).view(np.uint32)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    result = np.uint32(np.uint32(size - np.uint32(0x38000000)) >> np.uint32(13))
    if size < np.uint32(0x38800000):
        result = np.uint32(np.int32(abs(np.float32(number)) * np.float32(2.0**24)))
    if size >= np.uint32(0x47800000):
        result = np.uint32(0x7C00)
    return np.int16(np.uint16(result | ((bits >> np.uint32(16)) & np.uint32(0x8000))))


def is_finite(array, bits):
    """Return whether an element's bits are finite."""
    raise NotImplementedError


@overload(is_finite)
def _is_finite(array, bits):
    infinity = np.int64(_INFINITY[array.dtype.name])
    return lambda array, bits: (np.int64(bits) & infinity) != infinity


def ordinal(array, bits):
    """Return the position of an element's bits among the floats of its type, int64; see ``reference.ordinal``."""
    raise NotImplementedError


@overload(ordinal)
def _ordinal(array, bits):
    top = np.int64(1 << (array.dtype.bitwidth - 1))

    def impl(array, bits):
        size = np.int64(bits) & (top - 1)
        return -size - 1 if np.int64(bits) & top else size

    return impl


def at_ordinal(array, number):
    """Return the bits at a position; the inverse of ``ordinal``."""
    raise NotImplementedError


@overload(at_ordinal)
def _at_ordinal(array, number):
    top = np.int64(1 << (array.dtype.bitwidth - 1))
    kind = {"uint16": np.uint16, "int16": np.int16, "uint32": np.uint32}[array.dtype.name]
    return lambda array, number: kind(number if number >= 0 else top - number - 1)
