"""The rounded addition and its undoing of ``reference``, compiled.

Weights enter and leave as bits, see ``_cpu_float``. A gain is always there, so that there is one loop for all: times 1
and by 1 change no bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from adaptkit.numerics.kernels._cpu_double import at_ordinal, is_finite, ordinal, rounded_once
from adaptkit.numerics.kernels._cpu_float import any_value, float_bits
from adaptkit.numerics.kernels._cpu_memory import inlined, jit
from adaptkit.numerics.kernels._reference_exact import check_length

_ONE = np.ones((1, 1))


@inlined
def result(array, bits, delta, gain):
    """What a weight is merged to, all in bits of the array's type."""
    return rounded_once(array, np.float64(any_value(array, bits)) * gain + delta)


@inlined
def candidate(array, merged, delta, gain):
    """The bits of ``reference._candidate``'s guess, and whether it is uncertain."""
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
    """A row of a gain that may have one row, one column or one of both."""
    row, step = (row if gain.shape[0] > 1 else 0), int(gain.shape[1] > 1)
    for j in range(out.size):
        out[j] = gain[row, j * step]


@jit
def _add_rounded(weight, delta, gain, out):
    factors = np.empty(weight.shape[1], np.float64)
    for row in range(weight.shape[0]):
        _row_of(gain, row, factors)
        for j in range(weight.shape[1]):
            out[row, j] = result(weight, weight[row, j], delta[row, j], factors[j])


@jit
def _candidates(merged, delta, gain, guess, doubtful):
    factors = np.empty(merged.shape[1], np.float64)
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


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
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


def _matrix(tensor: Tensor) -> Any:
    return float_bits(tensor.contiguous())


def _gain(gain: Tensor | None) -> Any:
    return _ONE if gain is None else gain.contiguous().numpy()


def add_rounded(weight: Tensor, delta: Tensor, gain: Tensor | None = None) -> Tensor:
    """See ``reference.add_rounded``."""
    out = torch.empty(weight.shape, dtype=weight.dtype)
    _add_rounded(_matrix(weight), delta.contiguous().numpy(), _gain(gain), float_bits(out))
    return out


def addition_sums(weight: Tensor, merged: Tensor, delta: Tensor) -> tuple[int, float, float, float]:
    """See ``reference.addition_sums``."""
    flat = _matrix(weight).reshape(-1), _matrix(merged).reshape(-1), delta.contiguous().numpy().reshape(-1)
    moved, squared_delta, squared_weight, overlap = _addition_sums(*flat)
    return int(moved), float(squared_delta), float(squared_weight), float(overlap)


def _guess(merged: Tensor, delta: Tensor, gain: Tensor | None) -> tuple[Tensor, Any]:
    """The guess at every weight, and whether it is uncertain."""
    guess, doubtful = torch.empty(merged.shape, dtype=merged.dtype), np.empty(merged.shape, np.uint8)
    _candidates(_matrix(merged), delta.contiguous().numpy(), _gain(gain), float_bits(guess), doubtful)
    return guess, doubtful.reshape(-1)


def undo_residual(weight: Tensor, merged: Tensor, delta: Tensor, gain: Tensor | None = None) -> Tensor:
    """See ``reference.undo_residual``."""
    guess, doubtful = _guess(merged, delta, gain)
    out = torch.empty(int(np.count_nonzero(doubtful)), dtype=torch.int64)
    _collect(_matrix(weight).reshape(-1), float_bits(guess).reshape(-1), doubtful, out.numpy())
    return out


def undo(merged: Tensor, delta: Tensor, residual: Tensor, gain: Tensor | None = None) -> tuple[Tensor, int]:
    """See ``reference.undo``."""
    guess, doubtful = _guess(merged, delta, gain)
    used = _apply(float_bits(guess).reshape(-1), doubtful, residual.contiguous().numpy())
    check_length(used, residual)
    return guess, used
