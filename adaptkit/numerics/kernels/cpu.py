"""The kernels of ``reference``, compiled by numba for one CPU core each; they release the GIL.

Every function gives the bits of its namesake in ``reference``; read that for what they mean. Weights enter as exact
float32 and leave as bits, since numpy has no bfloat16.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from adaptkit.numerics.kernels.reference import NF4_LEVELS, TINY

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")

_LEVELS = np.array(NF4_LEVELS, dtype=np.float32)
_BOUNDS = (_LEVELS[:-1] + _LEVELS[1:]) / np.float32(2)
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_LEAST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}


def _numpy(tensor: Tensor) -> Any:
    """View a tensor's memory as numpy, bit patterns for the types that numpy lacks."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@_jit
def _encode(flat, block_size, bounds, codes, absmax):  # type: ignore[no-untyped-def]
    one, tiny = np.float32(1), np.float32(TINY)
    q = np.empty(block_size + 1, np.uint8)
    for block in range(absmax.size):
        start = block * block_size
        size = min(block_size, flat.size - start)
        largest = np.float32(0)
        for i in range(size):
            largest = max(largest, abs(flat[start + i]))
        divisor = max(largest, tiny)
        reciprocal = one / divisor
        tail = size < block_size
        absmax[block] = divisor if tail else largest
        for i in range(size):
            x = flat[start + i]
            scaled = min(max(x / divisor if tail else x * reciprocal, -one), one)
            level = 0
            for j in range(15):
                level += bounds[j] < scaled
            q[i] = level
        q[size] = 7
        for i in range((size + 1) // 2):
            codes[start // 2 + i] = (q[2 * i] << 4) | q[2 * i + 1]


def nf4_encode(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ``reference.nf4_encode``."""
    flat = weight.reshape(-1).float().contiguous()
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32)
    _encode(flat.numpy(), block_size, _BOUNDS, codes.numpy(), absmax.numpy())
    return codes, absmax


@_jit
def _decode_float32(codes, absmax, block_size, levels, out):  # type: ignore[no-untyped-def]
    table = np.empty(16, np.float32)
    for block in range(absmax.size):
        for level in range(16):
            table[level] = levels[level] * absmax[block]
        start = block * block_size
        end = min(start + block_size, out.size)
        for i in range(start // 2, end // 2):
            byte = codes[i]
            out[2 * i] = table[byte >> 4]
            out[2 * i + 1] = table[byte & 15]
        if end % 2:
            out[end - 1] = table[codes[end // 2] >> 4]


@_jit
def _decode_bfloat16(codes, absmax, block_size, levels, out):  # type: ignore[no-untyped-def]
    table = np.empty(16, np.uint16)
    for block in range(absmax.size):
        for level in range(16):
            bits = np.float32(levels[level] * absmax[block]).view(np.uint32)
            table[level] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        start = block * block_size
        end = min(start + block_size, out.size)
        for i in range(start // 2, end // 2):
            byte = codes[i]
            out[2 * i] = table[byte >> 4]
            out[2 * i + 1] = table[byte & 15]
        if end % 2:
            out[end - 1] = table[codes[end // 2] >> 4]


def nf4_decode(codes: Tensor, absmax: Tensor, count: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """See ``reference.nf4_decode``."""
    decode, out_dtype = (
        (_decode_bfloat16, torch.bfloat16) if dtype == torch.bfloat16 else (_decode_float32, torch.float32)
    )
    out = torch.empty(count, dtype=out_dtype)
    decode(_numpy(codes.reshape(-1)), _numpy(absmax), block_size, _LEVELS, _numpy(out))
    return out.to(dtype)


@_jit
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
    arrays = _numpy(lora_a.double()), _numpy(lora_b.double())
    _low_rank_delta(*arrays, np.array(ranks, np.int64), np.array(scales, np.float64), delta.numpy())
    return delta


@_jit
def _round(exact, mantissa, least_exponent):  # type: ignore[no-untyped-def]
    """Round a float64 to a float with ``mantissa`` bits, once, as a float32 that holds the result exactly.

    Adding and taking away 1.5 · 2^(52 + q) leaves a multiple of 2^q, rounded by the processor to nearest, ties to even.
    """
    if mantissa == 23:
        return np.float32(exact)
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


@_jit
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


@_jit
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


@_jit
def _ordinal(bits, mantissa):  # type: ignore[no-untyped-def]
    top = np.int64(0x80000000) if mantissa == 23 else np.int64(0x8000)
    return bits if bits < top else -(bits - top) - 1


@_jit
def _unordinal(ordinal, mantissa):  # type: ignore[no-untyped-def]
    top = np.int64(0x80000000) if mantissa == 23 else np.int64(0x8000)
    return ordinal if ordinal >= 0 else -(ordinal + 1) + top


@_jit
def _add_rounded(weight, delta, mantissa, least_exponent, out):  # type: ignore[no-untyped-def]
    for i in range(weight.size):
        out[i] = _bits(_round(np.float64(weight[i]) + delta[i], mantissa, least_exponent), mantissa)


def add_rounded(weight: Tensor, delta: Tensor) -> Tensor:
    """See ``reference.add_rounded``."""
    dtype = weight.dtype
    out = torch.empty(weight.shape, dtype=_BITS[dtype])
    flat = _numpy(weight.reshape(-1).float())
    _add_rounded(flat, _numpy(delta.view(-1)), _MANTISSA[dtype], _LEAST_EXPONENT[dtype], out.numpy().reshape(-1))
    return out.view(dtype)


@_jit
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


@_jit
def _undo_residual(weight, merged, delta, mantissa, least_exponent, largest, out):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(merged.size):
        guess, certain = _candidate(merged[i], delta[i], mantissa, least_exponent, largest)
        if not certain:
            out[count] = _ordinal(_bits(weight[i], mantissa), mantissa) - guess
            count += 1
    return count


@_jit
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


def undo_residual(weight: Tensor, merged: Tensor, delta: Tensor) -> Tensor:
    """See ``reference.undo_residual``."""
    dtype = weight.dtype
    out = torch.empty(weight.numel(), dtype=torch.int64)
    count = _undo_residual(
        _numpy(weight.reshape(-1).float()),
        _numpy(merged.reshape(-1).float()),
        _numpy(delta.view(-1)),
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
    used = _undo(
        _numpy(merged.reshape(-1).float()),
        _numpy(delta.view(-1)),
        _numpy(residual),
        _MANTISSA[dtype],
        _LEAST_EXPONENT[dtype],
        np.float32(torch.finfo(dtype).max),
        out.numpy().reshape(-1),
    )
    if used > residual.numel():
        raise ValueError(f"{used} weights are ambiguous, the record holds {residual.numel()}")
    return out.view(dtype), used
