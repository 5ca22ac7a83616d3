"""The rounded addition of ``reference`` and its inverse, compiled.

Weights are passed as bits, see ``_cpu_float``. Loops always have a gain, so that one loop serves all cases: multiplying
or dividing by 1 changes no bit.
"""

from __future__ import annotations

from typing import Any

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.arrays import AnyValues, Array, Values, as_array, like
from adaptkit.numerics.kernels._cpu_double import at_ordinal, is_finite, ordinal, rounded_once
from adaptkit.numerics.kernels._cpu_float import any_value, float_bits
from adaptkit.numerics.kernels._cpu_memory import empty
from adaptkit.numerics.kernels._jit import compiled, inlined, jit
from adaptkit.numerics.kernels._reference_exact import check_length

_ONE = np.ones((1, 1))


@inlined
def result(array, bits, delta, gain):
    """Return the bits of gain · weight + delta, rounded once to the array's type."""
    return rounded_once(array, np.float64(any_value(array, bits)) * gain + delta)


@inlined
def candidate(array, merged, delta, gain):
    """Return the bits of the guess of ``reference._candidate``, and whether it is uncertain."""
    guess = rounded_once(array, (np.float64(any_value(array, merged)) - delta) / gain)
    if not is_finite(array, guess):
        guess = merged
    place = ordinal(array, guess)
    hit = result(array, guess, delta, gain) == merged
    above = result(array, at_ordinal(array, place + 1), delta, gain) == merged
    below = result(array, at_ordinal(array, place - 1), delta, gain) == merged
    return guess, (not hit) | above | below


@jit
def _row_of(gain, row, out):
    """Write a row of a gain to ``out``, broadcasting a gain that has one row or one column."""
    row, step = (row if gain.shape[0] > 1 else 0), int(gain.shape[1] > 1)
    for j in range(out.size):
        out[j] = gain[row, j * step]


@jit
def _add_rounded(weight, delta, gain, factors, out):
    for row in range(weight.shape[0]):
        _row_of(gain, row, factors)
        for j in range(weight.shape[1]):
            out[row, j] = result(weight, weight[row, j], delta[row, j], factors[j])


@jit
def _candidates(merged, delta, gain, factors, guess, doubtful):
    for row in range(merged.shape[0]):
        _row_of(gain, row, factors)
        for j in range(merged.shape[1]):
            bits, uncertain = candidate(merged, merged[row, j], delta[row, j], factors[j])
            guess[row, j] = bits
            doubtful[row, j] = np.uint8(uncertain)


@jit
def _collect(weight, guess, doubtful, out):
    count = 0
    for i in range(weight.size):
        if doubtful[i]:
            out[count] = ordinal(weight, weight[i]) - ordinal(guess, guess[i])
            count += 1
    return count


@jit
def _apply(guess, doubtful, residual):
    count = 0
    for i in range(guess.size):
        if doubtful[i]:
            if count < residual.size:
                guess[i] = at_ordinal(guess, ordinal(guess, guess[i]) + residual[count])
            count += 1
    return count


@compiled(fastmath={"reassoc", "contract"})
def _addition_sums(weight, merged, delta):
    moved, squared_delta, squared_weight, overlap = 0, 0.0, 0.0, 0.0
    for i in range(weight.size):
        before, after = np.float64(any_value(weight, weight[i])), np.float64(any_value(merged, merged[i]))
        effect = after - before
        moved += effect != 0
        squared_delta += delta[i] * delta[i]
        squared_weight += before * before
        overlap += effect * delta[i]
    return moved, squared_delta, squared_weight, overlap


def _contiguous(values: Values) -> Array:
    return np.ascontiguousarray(as_array(values))


def _matrix(values: Values) -> Any:
    return float_bits(_contiguous(values))


def _gain(gain: Values | None) -> Any:
    return _ONE if gain is None else _contiguous(gain)


def add_rounded(weight: AnyValues, delta: Values, gain: Values | None = None) -> AnyValues:
    """See ``reference.add_rounded``."""
    before = _contiguous(weight)
    out = empty(before.shape, before.dtype)
    _add_rounded(float_bits(before), _contiguous(delta), _gain(gain), np.empty(before.shape[1]), float_bits(out))
    return like(weight, out)


def addition_sums(weight: Values, merged: Values, delta: Values) -> tuple[int, float, float, float]:
    """See ``reference.addition_sums``."""
    flat = _matrix(weight).reshape(-1), _matrix(merged).reshape(-1), _contiguous(delta).reshape(-1)
    moved, squared_delta, squared_weight, overlap = _addition_sums(*flat)
    return int(moved), float(squared_delta), float(squared_weight), float(overlap)


def _guess(merged: Values, delta: Values, gain: Values | None) -> tuple[Array, Any]:
    """Return the guess at every weight, and (flattened) whether it is uncertain."""
    after = _contiguous(merged)
    guess, doubtful = empty(after.shape, after.dtype), np.empty(after.shape, np.uint8)
    room = np.empty(after.shape[1])
    _candidates(float_bits(after), _contiguous(delta), _gain(gain), room, float_bits(guess), doubtful)
    return guess, doubtful.reshape(-1)


def undo_residual(weight: AnyValues, merged: AnyValues, delta: Values, gain: Values | None = None) -> AnyValues:
    """See ``reference.undo_residual``."""
    guess, doubtful = _guess(merged, delta, gain)
    out = np.empty(int(np.count_nonzero(doubtful)), np.int64)
    _collect(_matrix(weight).reshape(-1), float_bits(guess).reshape(-1), doubtful, out)
    return like(weight, out)


def undo(merged: AnyValues, delta: Values, residual: Values, gain: Values | None = None) -> tuple[AnyValues, int]:
    """See ``reference.undo``."""
    guess, doubtful = _guess(merged, delta, gain)
    values = _contiguous(residual)
    used = _apply(float_bits(guess).reshape(-1), doubtful, values)
    check_length(used, values.size)
    return like(merged, guess), used
