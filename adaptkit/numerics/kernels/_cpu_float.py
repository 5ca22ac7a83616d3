"""Conversions between the bits of three float types and float32 in compiled loops, branch-free to be vectorized.

numpy has no bfloat16 and numba no float16, so weights are passed as bits, and the integer type of an array determines
the float type: uint16 is bfloat16, int16 is float16, uint32 is float32. Other types cannot be compiled.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from typing import Any

import numpy as np

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels._jit import inlined, overload

_VIEWS = {"bfloat16": "uint16", "float16": "int16", "float32": "uint32"}


def float_bits(array: Array) -> Any:
    """View an array as one of the integer type that represents its float type."""
    return array.view(_VIEWS[array.dtype.name])


def magnitude(array, i):
    """Return the bits of an element without its sign, as a signed integer that sorts like magnitudes, NaN last."""
    raise NotImplementedError


@overload(magnitude)
def _magnitude(array, i):
    if array.dtype.name == "uint32":
        return lambda array, i: np.int32(array[i] & np.uint32(0x7FFFFFFF))
    return lambda array, i: np.int16(np.uint16(array[i]) & np.uint16(0x7FFF))


def value(array, bits):
    """Return the float32 value of an element's bits, which must be finite."""
    raise NotImplementedError


@overload(value)
def _value(array, bits):
    if array.dtype.name == "uint16":
        return lambda array, bits: np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    if array.dtype.name == "uint32":
        return lambda array, bits: np.uint32(bits).view(np.float32)
    return _value_float16 if array.dtype.name == "int16" else None


def _value_float16(array, bits):
    half = np.uint32(np.uint16(bits))
    shifted = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
    result = np.uint32(shifted + np.uint32(0x38000000)).view(np.float32)  # exponent bias 127 instead of 15
    denormal = np.float32(np.int32(half & np.uint32(0x3FF))) * np.float32(2.0**-24)
    if shifted < np.uint32(0x00800000):
        result = denormal
    if half >= np.uint32(0x8000):
        return -result
    return result


def any_value(array, bits):
    """Return the float32 value of any element's bits; NaN for float16's infinity."""
    raise NotImplementedError


@overload(any_value)
def _any_value(array, bits):
    if array.dtype.name == "int16":
        return lambda array, bits: np.float32(np.nan) if bits & 0x7C00 == 0x7C00 else value(array, bits)
    return lambda array, bits: value(array, bits)


def rounded(array, number):
    """Return the bits of a float32 rounded to an array's type, ties to even; a NaN must come from ``canonical_nan``."""
    raise NotImplementedError


@overload(rounded)
def _rounded(array, number):
    if array.dtype.name == "uint16":
        return lambda array, number: _to_bfloat16(number)
    if array.dtype.name == "uint32":
        return lambda array, number: np.float32(number).view(np.uint32)
    return (lambda array, number: _to_float16(number)) if array.dtype.name == "int16" else None


@inlined
def canonical_nan(number):
    """Replace any NaN with the standard one, whose low bits are zero, so that rounding cannot carry into the sign."""
    return number if number == number else np.float32(np.nan)


@inlined
def sortable_bits(bits):
    """Map the int32 bits of a float32 to an integer that sorts like the floats; the function is its own inverse.

    The compiler vectorizes a maximum of integers, but not one of floats.
    """
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inlined
def _to_bfloat16(number):
    bits = np.float32(number).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inlined
def _to_float16(number):
    bits = np.float32(number).view(np.uint32)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    result = np.uint32(size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1)) - np.uint32(0x38000000))
    result = np.uint32(result >> np.uint32(13))
    # One half has the spacing of float16's denormals, so adding it rounds to them.
    denormal = np.uint32(np.float32(abs(np.float32(number)) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000))
    if size < np.uint32(0x38800000):
        result = denormal
    if size >= np.uint32(0x477FF000):
        result = np.uint32(0x7C00)
    if size > np.uint32(0x7F800000):
        result = np.uint32(0x7E00)
    return np.int16(np.uint16(result | ((bits >> np.uint32(16)) & np.uint32(0x8000))))
