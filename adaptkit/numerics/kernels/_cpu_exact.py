"""The canonical delta, the rounded addition and its undoing of ``reference``, compiled.

Weights enter as exact float32 and leave as bits, since numpy has no bfloat16.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from adaptkit.numerics.kernels._cpu_memory import as_numpy, jit

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_LEAST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}


@jit
def _low_rank_delta(a, b, ranks, scales, delta):  # type: ignore[no-untyped-def]
    columns = a.shape[1]
    inner = np.empty(columns, np.float64)
    for row in range(b.shape[0]):
        start = 0
        for adapter in range(ranks.size):
            inner[:] = 0.0
            for k in range(start, start + ranks[adapter]):
                factor = b[row, k]
                for j in range(columns):
                    inner[j] += factor * a[k, j]
            scale = scales[adapter]
            for j in range(columns):
                delta[row, j] += inner[j] * scale
            start += ranks[adapter]


def low_rank_delta(lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Tensor:
    """See ``reference.low_rank_delta``."""
    delta = torch.zeros(lora_b.shape[0], lora_a.shape[1], dtype=torch.float64)
    arrays = as_numpy(lora_a.double()), as_numpy(lora_b.double())
    _low_rank_delta(*arrays, np.array(ranks, np.int64), np.array(scales, np.float64), delta.numpy())
    return delta


@jit
def _round(exact, mantissa, least_exponent):  # type: ignore[no-untyped-def]
    """Round a float64 to a float with ``mantissa`` bits, once, as a float32 that holds the result exactly.

    Adding and taking away 1.5 · 2^(52 + q) leaves a multiple of 2^q, rounded by the processor to nearest, ties to even.
    """
    if mantissa == 23:
        return np.float32(exact)
    exact = min(max(exact, -1e39), 1e39)  # far beyond what the shorter types hold, near enough for the trick
    bits = np.float64(exact).view(np.int64)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    quantum = max(exponent, np.int64(least_exponent)) - mantissa
    magic = np.int64(((quantum + 52 + 1023) << 52) | (1 << 51)).view(np.float64)
    rounded = (exact + magic) - magic
    if rounded == 0:
        return np.float32(exact * 0.0)  # keeps the sign
    if mantissa == 10 and abs(rounded) > 65504.0:
        return np.float32(np.inf if rounded > 0 else -np.inf)
    return np.float32(rounded)


@jit
def _bits(value, mantissa):  # type: ignore[no-untyped-def]
    """The bit pattern of a value that its type holds exactly."""
    bits = np.int64(np.float32(value).view(np.uint32))
    if mantissa == 23:
        return bits
    if mantissa == 7:
        return bits >> 16
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if magnitude >= 0x7F800000:
        return sign | 0x7C00
    if magnitude >= 0x38800000:  # 2^-14, the least normal number
        return sign | ((magnitude - 0x38000000) >> 13)
    return sign | np.int64(abs(value) * np.float32(16777216.0))


@jit
def _value(bits, mantissa):  # type: ignore[no-untyped-def]
    """Undo ``_bits``."""
    if mantissa == 23:
        return np.uint32(bits).view(np.float32)
    if mantissa == 7:
        return np.uint32(bits << 16).view(np.float32)
    sign, magnitude = (bits & 0x8000) << 16, bits & 0x7FFF
    if magnitude >= 0x7C00:
        return np.uint32(sign | 0x7F800000).view(np.float32)
    if magnitude >= 0x0400:
        return np.uint32(sign | ((magnitude << 13) + 0x38000000)).view(np.float32)
    small = np.float32(magnitude) / np.float32(16777216.0)
    return -small if sign else small


@jit
def _ordinal(bits, mantissa):  # type: ignore[no-untyped-def]
    top = np.int64(0x80000000) if mantissa == 23 else np.int64(0x8000)
    return bits if bits < top else -(bits - top) - 1


@jit
def _unordinal(ordinal, mantissa):  # type: ignore[no-untyped-def]
    top = np.int64(0x80000000) if mantissa == 23 else np.int64(0x8000)
    return ordinal if ordinal >= 0 else -(ordinal + 1) + top


# bfloat16 is what models are made of, so it has loops of its own, without a branch: the compiler vectorizes them.


@jit
def _round_bfloat16(exact):  # type: ignore[no-untyped-def]
    """``_bits(_round(exact))`` for bfloat16; what is too large becomes infinity."""
    bits = np.float64(exact).view(np.int64)
    size = min(abs(exact), 1e39)
    exponent = (np.float64(size).view(np.int64) >> 52) - 1023
    quantum = max(exponent, np.int64(-126)) - 7
    magic = np.int64(((quantum + 52 + 1023) << 52) | (1 << 51)).view(np.float64)
    rounded = np.float32((size + magic) - magic)
    return (np.int64(rounded.view(np.uint32)) >> 16) | ((bits >> 48) & 0x8000)


@jit
def _ordinal_bfloat16(bits):  # type: ignore[no-untyped-def]
    return bits if bits < 0x8000 else 0x7FFF - bits


@jit
def _near_bfloat16(ordinal, delta):  # type: ignore[no-untyped-def]
    """The bits to which the weight with this ordinal is merged."""
    bits = ordinal if ordinal >= 0 else 0x7FFF - ordinal
    return _round_bfloat16(np.float64(np.uint32(bits << 16).view(np.float32)) + delta)


@jit
def _add_rounded_bfloat16(weight, delta, out):  # type: ignore[no-untyped-def]
    for i in range(weight.size):
        out[i] = _round_bfloat16(np.float64(np.uint32(np.uint32(weight[i]) << 16).view(np.float32)) + delta[i])


@jit
def _candidates_bfloat16(merged, delta, guess, certain):  # type: ignore[no-untyped-def]
    for i in range(merged.size):
        target = np.int64(merged[i])
        back = np.float64(np.uint32(np.uint32(merged[i]) << 16).view(np.float32)) - delta[i]
        bits = _round_bfloat16(back)
        bits -= np.int64((bits & 0x7FFF) == 0x7F80)  # the largest number instead of infinity
        found = _ordinal_bfloat16(bits)
        hit = _near_bfloat16(found, delta[i]) == target
        above = _near_bfloat16(found + 1, delta[i]) == target
        below = _near_bfloat16(found - 1, delta[i]) == target
        guess[i] = found
        certain[i] = hit & ~above & ~below


@jit
def _undo_residual_bfloat16(weight, guess, certain, out):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(weight.size):
        if not certain[i]:
            out[count] = _ordinal_bfloat16(np.int64(weight[i])) - guess[i]
            count += 1
    return count


@jit
def _undo_bfloat16(guess, certain, residual, out):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(guess.size):
        ordinal = np.int64(guess[i])
        if not certain[i]:
            if count < residual.size:
                ordinal += residual[count]
            count += 1
        out[i] = ordinal if ordinal >= 0 else 0x7FFF - ordinal
    return count


@jit
def _add_rounded(weight, delta, mantissa, least_exponent, out):  # type: ignore[no-untyped-def]
    for i in range(weight.size):
        out[i] = _bits(_round(np.float64(weight[i]) + delta[i], mantissa, least_exponent), mantissa)


def add_rounded(weight: Tensor, delta: Tensor) -> Tensor:
    """See ``reference.add_rounded``."""
    dtype = weight.dtype
    out = torch.empty(weight.shape, dtype=_BITS[dtype])
    if dtype == torch.bfloat16:
        _add_rounded_bfloat16(as_numpy(weight.reshape(-1)), as_numpy(delta.view(-1)), out.numpy().reshape(-1))
        return out.view(dtype)
    flat = as_numpy(weight.reshape(-1).float())
    _add_rounded(flat, as_numpy(delta.view(-1)), _MANTISSA[dtype], _LEAST_EXPONENT[dtype], out.numpy().reshape(-1))
    return out.view(dtype)


@jit
def _candidate(merged, delta, mantissa, least_exponent, largest):  # type: ignore[no-untyped-def]
    """The ordinal that plain subtraction gives, and whether it is certain."""
    back = _round(np.float64(merged) - delta, mantissa, least_exponent)
    back = min(max(back, -largest), largest)
    guess = _ordinal(_bits(back, mantissa), mantissa)
    target = _bits(merged, mantissa)
    certain = True
    for step in range(-1, 2):
        near = np.float64(_value(_unordinal(guess + step, mantissa), mantissa))
        hit = _bits(_round(near + delta, mantissa, least_exponent), mantissa) == target
        certain = certain and hit == (step == 0)
    return guess, certain


@jit
def _undo_residual(weight, merged, delta, mantissa, least_exponent, largest, out):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(merged.size):
        guess, certain = _candidate(merged[i], delta[i], mantissa, least_exponent, largest)
        if not certain:
            out[count] = _ordinal(_bits(weight[i], mantissa), mantissa) - guess
            count += 1
    return count


@jit
def _undo(merged, delta, residual, mantissa, least_exponent, largest, out):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(merged.size):
        guess, certain = _candidate(merged[i], delta[i], mantissa, least_exponent, largest)
        if not certain:
            if count < residual.size:
                guess += residual[count]
            count += 1
        out[i] = _unordinal(guess, mantissa)
    return count


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _addition_sums(weight, merged, delta):  # type: ignore[no-untyped-def]
    moved, squared_delta, squared_weight, overlap = 0, 0.0, 0.0, 0.0
    for i in range(weight.size):
        effect = np.float64(merged[i]) - np.float64(weight[i])
        moved += effect != 0
        squared_delta += delta[i] * delta[i]
        squared_weight += np.float64(weight[i]) * np.float64(weight[i])
        overlap += effect * delta[i]
    return moved, squared_delta, squared_weight, overlap


def addition_sums(weight: Tensor, merged: Tensor, delta: Tensor) -> tuple[int, float, float, float]:
    """See ``reference.addition_sums``."""
    flat = as_numpy(weight.reshape(-1).float()), as_numpy(merged.reshape(-1).float()), as_numpy(delta.view(-1))
    moved, squared_delta, squared_weight, overlap = _addition_sums(*flat)
    return int(moved), float(squared_delta), float(squared_weight), float(overlap)


def _candidates(merged: Tensor, delta: Tensor) -> tuple[Any, Any]:
    """``_candidate`` of every bfloat16 element: ordinals, and whether they are certain."""
    guess, certain = np.empty(merged.numel(), np.int32), np.empty(merged.numel(), np.bool_)
    _candidates_bfloat16(as_numpy(merged.reshape(-1)), as_numpy(delta.view(-1)), guess, certain)
    return guess, certain


def undo_residual(weight: Tensor, merged: Tensor, delta: Tensor) -> Tensor:
    """See ``reference.undo_residual``."""
    dtype = weight.dtype
    out = torch.empty(weight.numel(), dtype=torch.int64)
    if dtype == torch.bfloat16:
        candidates = _candidates(merged, delta)
        return out[: _undo_residual_bfloat16(as_numpy(weight.reshape(-1)), *candidates, out.numpy())].clone()
    count = _undo_residual(
        as_numpy(weight.reshape(-1).float()),
        as_numpy(merged.reshape(-1).float()),
        as_numpy(delta.view(-1)),
        _MANTISSA[dtype],
        _LEAST_EXPONENT[dtype],
        np.float32(torch.finfo(dtype).max),
        out.numpy(),
    )
    return out[:count].clone()


def undo(merged: Tensor, delta: Tensor, residual: Tensor) -> tuple[Tensor, int]:
    """See ``reference.undo``."""
    dtype = merged.dtype
    out = torch.empty(merged.shape, dtype=_BITS[dtype])
    if dtype == torch.bfloat16:
        used = _undo_bfloat16(*_candidates(merged, delta), as_numpy(residual), out.numpy().reshape(-1))
    else:
        used = _undo(
            as_numpy(merged.reshape(-1).float()),
            as_numpy(delta.view(-1)),
            as_numpy(residual),
            _MANTISSA[dtype],
            _LEAST_EXPONENT[dtype],
            np.float32(torch.finfo(dtype).max),
            out.numpy().reshape(-1),
        )
    if used > residual.numel():
        raise ValueError(f"{used} weights are ambiguous, the record holds {residual.numel()}")
    return out.view(dtype), used
