"""The block-wise part of ``reference``: encoding and decoding of weights and of constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from adaptkit.lazy import torch
from adaptkit.numerics.kernels.codebook import Codebook

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-38
"""Least divisor: replaces the absmax of a zero block, so that no scale is infinite."""

GROUP = 256
"""Number of constants that share one nested constant."""

Encoded: TypeAlias = "tuple[Any, Any, Any]"
"""Codes, absmax, and moments (None if not requested)."""


def encode_4bit(weight: Tensor, block_size: int, book: Codebook, measure: bool = False) -> Encoded:
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
    flat = weight.reshape(-1).float()
    full = flat.numel() - flat.numel() % block_size
    blocks, tail = flat[:full].view(-1, block_size), flat[full:]
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)).reshape(-1)
    if tail.numel():
        tail_absmax = tail.abs().amax().clamp(min=TINY).reshape(1)
        absmax = torch.cat([absmax, tail_absmax])
        scaled = torch.cat([scaled, tail / tail_absmax])
    rank = torch.bucketize(scaled.clamp(-1, 1), torch.tensor(book.bounds, device=flat.device))
    q = torch.tensor(book.order, dtype=torch.uint8, device=flat.device)[rank]
    moments = None
    if measure:
        moments = _moments(flat, torch.tensor(book.ascending, device=flat.device)[rank], block_size)
    if q.numel() % 2:
        q = torch.cat([q, q.new_full((1,), book.zero)])
    return (q[::2] << 4) | q[1::2], absmax, moments


def decode_4bit(
    codes: Tensor, absmax: Tensor, count: int, block_size: int, book: Codebook, dtype: torch.dtype
) -> Tensor:
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
    levels = torch.tensor(book.levels, dtype=torch.float32).to(codes.device, non_blocking=True)  # does not block
    byte = torch.arange(256, device=codes.device)
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)  # one look-up decodes both weights of a byte
    values = pairs.index_select(0, codes.reshape(-1).int()).view(-1)[:count]
    return _scale(values, absmax, block_size).to(dtype)


def encode_8bit(weight: Tensor, block_size: int, measure: bool = False) -> Encoded:
    """Round 127 / absmax · weight to the nearest integer, ties to even, block by block.

    Args:
        weight: any shape, floating point, N elements, taken in row-major order.
        block_size: number of weights that share one scale, at least 1.
        measure: whether to return the moments too.

    Returns:
        codes (N,) int8 and absmax (ceil(N / block_size),) float32, both 0 in a zero block; moments as in
        ``encode_4bit``, a code's level being code / 127.
    """
    flat = weight.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    factor = int8_factors(absmax).unsqueeze(1)
    # Below 4e-37 the factor overflows, so such a block is divided by its absmax first.
    scaled = torch.where(factor.isinf(), blocks / absmax.unsqueeze(1) * 127.0, blocks * factor)
    codes = scaled.round().clamp(-127, 127).to(torch.int8).view(-1)[: flat.numel()]
    return codes, absmax, _moments(flat, codes.double() / 127, block_size) if measure else None


def int8_factors(absmax: Tensor) -> Tensor:
    """Return the factor of each block: 127 / absmax, 0 for a zero block, infinity where that overflows."""
    return torch.where(absmax > 0, torch.full_like(absmax, 127) / absmax, torch.zeros_like(absmax))


def steps_8bit(absmax: Tensor) -> Tensor:
    """Return the step of each block, by which its codes are multiplied: absmax / 127, in float32."""
    return absmax / torch.full_like(absmax, 127)  # by a tensor: for a number torch may use the reciprocal


def decode_8bit(codes: Tensor, absmax: Tensor, count: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """Return code times absmax / 127 in float32, rounded once to ``dtype``, (count,); arguments of ``decode_4bit``."""
    step = steps_8bit(absmax)
    return _scale(codes.reshape(-1)[:count].float(), step, block_size).to(dtype)


def encode_constants(absmax: Tensor, lookup: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, float]:
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
    count = absmax.numel()
    offset = float(np.float32(np.cumsum(absmax.cpu().numpy(), dtype=np.float64)[-1] / count))
    padded = torch.nn.functional.pad(absmax - offset, (0, -count % GROUP)).view(-1, GROUP)
    nested = padded.abs().amax(dim=1)
    reciprocal = torch.where(nested > 0, 1.0 / nested, torch.zeros_like(nested)).unsqueeze(1)
    # Below 3e-39 the reciprocal overflows, and 0 times it is NaN, so such a group is divided.
    scaled = torch.where(reciprocal.isinf(), padded / nested.unsqueeze(1), padded * reciprocal)
    scaled = scaled.clamp(-1, 1).view(-1)[:count]
    index = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).to(torch.int32)
    codes = lookup[index]
    codes[(nested == 0).repeat_interleave(GROUP)[:count]] = 0
    # A small constant beside a large one may decode to less than zero, which would flip the signs of its block.
    while bool((negative := decode_constants(codes, nested, offset, levels) < 0).any()):
        codes[negative] += 1
    return codes, nested, offset


def decode_constants(codes: Tensor, nested_absmax: Tensor, offset: float, levels: Tensor) -> Tensor:
    """Return level times nested absmax plus offset, each rounded to float32: (M,); see ``encode_constants``."""
    scale = nested_absmax.repeat_interleave(GROUP)[: codes.numel()]
    return levels[codes.int()] * scale + offset


def _scale(values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    full = values.numel() - values.numel() % block_size
    scaled = (values[:full].view(-1, block_size) * absmax[: full // block_size].unsqueeze(1)).reshape(-1)
    if full < values.numel():
        scaled = torch.cat([scaled, values[full:] * absmax[-1]])
    return scaled


def _moments(flat: Tensor, levels: Tensor, block_size: int) -> Tensor:
    padding = (0, -flat.numel() % block_size)
    x, y = (torch.nn.functional.pad(v.double(), padding).view(-1, block_size) for v in (flat, levels))
    return torch.stack([(x * x).sum(1), (x * y).sum(1), (y * y).sum(1)], dim=1).float()
