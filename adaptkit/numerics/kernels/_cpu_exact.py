"""The rounded addition of ``reference`` and its inverse, compiled.

Weights are passed as bits, see ``_cpu_float``. Loops always have a gain, so that one loop serves all cases: multiplying
or dividing by 1 changes no bit.
"""

from __future__ import annotations

from typing import Any

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels._cpu_double import at_ordinal, is_finite, ordinal, rounded_once
from adaptkit.numerics.kernels._cpu_float import any_value, float_bits
from adaptkit.numerics.kernels._jit import compiled, inlined, jit
from adaptkit.numerics.kernels._reference_exact import check_length


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
def _add_rounded(weight, delta, gain, out):
    for i in range(weight.size):
        out[i] = result(weight, weight[i], delta[i], gain[i])


@jit
def _candidates(merged, delta, gain, guess, doubtful):
    for i in range(merged.size):
        guess[i], uncertain = candidate(merged, merged[i], delta[i], gain[i])
        doubtful[i] = np.uint8(uncertain)


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


def _bits(values: Array) -> Any:
    return float_bits(np.ascontiguousarray(values).reshape(-1))


def _changes(shape: tuple[int, ...], delta: Array, gain: Array | None) -> tuple[Array, Array]:
    """Return delta and gain for each weight, flattened."""
    gains = np.ones(shape) if gain is None else np.broadcast_to(gain, shape)
    return np.ascontiguousarray(delta).reshape(-1), np.ascontiguousarray(gains).reshape(-1)


def add_rounded(weight: Array, delta: Array, gain: Array | None = None) -> Array:
    """See ``reference.add_rounded``."""
    out: Array = np.empty(weight.shape, weight.dtype)
    _add_rounded(_bits(weight), *_changes(weight.shape, delta, gain), _bits(out))
    return out


def addition_sums(weight: Array, merged: Array, delta: Array) -> tuple[int, float, float, float]:
    """See ``reference.addition_sums``."""
    flat = np.ascontiguousarray(delta).reshape(-1)
    moved, squared_delta, squared_weight, overlap = _addition_sums(_bits(weight), _bits(merged), flat)
    return int(moved), float(squared_delta), float(squared_weight), float(overlap)


def _guess(merged: Array, delta: Array, gain: Array | None) -> tuple[Array, Any]:
    """Return the guess at every weight, and (flattened) whether it is uncertain."""
    guess, doubtful = np.empty(merged.shape, merged.dtype), np.empty(merged.size, np.uint8)
    _candidates(_bits(merged), *_changes(merged.shape, delta, gain), _bits(guess), doubtful)
    return guess, doubtful


def undo_residual(weight: Array, merged: Array, delta: Array, gain: Array | None = None) -> Array:
    """See ``reference.undo_residual``."""
    guess, doubtful = _guess(merged, delta, gain)
    out = np.empty(int(np.count_nonzero(doubtful)), np.int64)
    _collect(_bits(weight), _bits(guess), doubtful, out)
    return out


def undo(merged: Array, delta: Array, residual: Array, gain: Array | None = None) -> tuple[Array, int]:
    """See ``reference.undo``."""
    guess, doubtful = _guess(merged, delta, gain)
    used = _apply(_bits(guess), doubtful, np.ascontiguousarray(residual))
    check_length(used, residual.size)
    return guess, used
