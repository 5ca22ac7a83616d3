"""The block-wise part of ``reference``: encoding and decoding of weights and of constants."""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptkit.numerics.dtypes import Array, cast
from adaptkit.numerics.kernels.codebook import Codebook

TINY = 1e-38
"""Least divisor: replaces the absmax of a zero block, so that no scale is infinite."""

GROUP = 256
"""Number of constants that share one nested constant."""

Encoded = tuple[Array, Array, Array | None]
"""Codes, absmax, and moments (None if not requested)."""


@np.errstate(all="ignore")
def encode_4bit(weight: Array, block_size: int, book: Codebook, measure: bool = False) -> Encoded:
    """Map each weight to the nearest level of a codebook after scaling its block to [-1, 1].

    Args:
        weight: any shape, floating point, N elements, taken in row-major order.
        block_size: number of weights that share one scale; even.
        book: the codebook.
        measure: whether to return the moments too.

    Returns:
        codes: (ceil(N / 2),) uint8, two per byte, the earlier weight in the high nibble; if N is odd, the last low
            nibble is the code of zero.
        absmax: (ceil(N / block_size),) float32, in the weight's units; for a block of zeros 0, or ``TINY`` if it is a
            short last block; not finite exactly where the block is not.
        moments: (ceil(N / block_size), 3) float32, or None. With x a weight and l its level: Σ x², Σ x l, Σ l² of each
            block, added in float64 in no fixed order and rounded once.

    Source: QLoRA (arXiv:2305.14314), as bitsandbytes 0.50 rounds it on a CPU: scaled by the reciprocal (a short last
    block by a true division), ties to the lower level.
    """
    flat = cast(weight.reshape(-1), np.float32)
    full = flat.size - flat.size % block_size
    blocks, tail = flat[:full].reshape(-1, block_size), flat[full:]
    absmax = np.abs(blocks).max(axis=1, initial=0)
    scaled = (blocks * (np.float32(1) / np.maximum(absmax, np.float32(TINY)))[:, None]).reshape(-1)
    if tail.size:
        tail_absmax = np.maximum(np.abs(tail).max(keepdims=True), np.float32(TINY))
        absmax, scaled = np.concatenate([absmax, tail_absmax]), np.concatenate([scaled, tail / tail_absmax])
    rank = np.searchsorted(np.array(book.bounds, np.float32), scaled)
    q = np.array(book.order, np.uint8)[rank]
    moments = _moments(flat, np.array(book.ascending, np.float32)[rank], block_size) if measure else None
    if q.size % 2:
        q = np.append(q, np.uint8(book.zero))
    return (q[::2] << 4) | q[1::2], absmax, moments


@np.errstate(all="ignore")
def decode_4bit(
    codes: Array, absmax: Array, count: int, block_size: int, book: Codebook, dtype: np.dtype[Any]
) -> Array:
    """Undo ``encode_4bit`` up to rounding: level times absmax in float32, rounded once to ``dtype``.

    Args:
        codes: (ceil(count / 2),) uint8.
        absmax: (ceil(count / block_size),) float32.
        count: number of weights.
        block_size: number of weights that share one scale.
        book: the codebook.
        dtype: bfloat16, float16 or float32.

    Returns:
        (count,) weights of ``dtype``.
    """
    q = np.stack([codes.reshape(-1) >> 4, codes.reshape(-1) & 15], axis=1).reshape(-1)[:count]
    return _scale(np.array(book.levels, np.float32)[q], absmax, block_size).astype(dtype)


@np.errstate(all="ignore")
def encode_constants(absmax: Array, lookup: Array, levels: Array) -> tuple[Array, Array, float]:
    """Quantize absmax constants to 8 bits in groups of ``GROUP``, after subtracting their mean.

    Args:
        absmax: (M,) float32, finite, not negative, M > 0.
        lookup: (65536,) uint8, the code of each of 65,536 evenly spaced values in [-1, 1].
        levels: (256,) float32, the level of each code, ascending, the last one 1.

    Returns:
        codes: (M,) uint8.
        nested_absmax: (ceil(M / GROUP),) float32.
        offset: the mean, a float64 sum in ascending order rounded once to float32: torch's own mean depends on the
            number of threads.

    Source: QLoRA (arXiv:2305.14314), section 3, as bitsandbytes 0.50 computes it on a CPU, with three exceptions: the
    mean; groups whose constants are within 3e-39 of the mean; and constants that would decode to a negative number,
    which get a larger code.
    """
    count, one = absmax.size, np.float32(1)
    offset = np.float32(np.cumsum(absmax, dtype=np.float64)[-1] / count)
    padded = np.pad(absmax - offset, (0, -count % GROUP)).reshape(-1, GROUP)
    nested = np.abs(padded).max(axis=1)
    reciprocal = np.where(nested > 0, one / nested, np.float32(0))[:, None]
    # Below 3e-39 the reciprocal overflows, and 0 times it is NaN, so such a group is divided.
    scaled = np.where(np.isinf(reciprocal), padded / nested[:, None], padded * reciprocal)
    scaled = np.clip(scaled, -1, 1).reshape(-1)[:count]
    codes = lookup[((scaled + one) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)).astype(np.int32)]
    codes[np.repeat(nested == 0, GROUP)[:count]] = 0
    # A small constant beside a large one may decode to less than zero, which would flip the signs of its block.
    while (negative := decode_constants(codes, nested, float(offset), levels) < 0).any():
        codes[negative] += 1
    return codes, nested, float(offset)


def decode_constants(codes: Array, nested_absmax: Array, offset: float, levels: Array) -> Array:
    """Return level times nested absmax plus offset, each rounded to float32: (M,); see ``encode_constants``."""
    scale = np.repeat(nested_absmax, GROUP)[: codes.size]
    return np.asarray(levels[codes] * scale + np.float32(offset))


def _scale(values: Array, absmax: Array, block_size: int) -> Array:
    return np.asarray(values * np.repeat(absmax, block_size)[: values.size])


def _moments(flat: Array, levels: Array, block_size: int) -> Array:
    padding = (0, -flat.size % block_size)
    x, y = (np.pad(v.astype(np.float64), padding).reshape(-1, block_size) for v in (flat, levels))
    return cast(np.stack([(x * x).sum(1), (x * y).sum(1), (y * y).sum(1)], axis=1), np.float32)
