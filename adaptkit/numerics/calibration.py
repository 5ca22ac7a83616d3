"""Activation-weighted scales for NF4: the same format and size, with less error where a linear's inputs are large.

If the errors ΔW of the weights are independent, the expected squared error of y = W x is Σ_ij ΔW_ij² E[x_j²], so each
weight's error counts in proportion to the second moment of its input. Plain NF4 sets each block's scale to its largest
weight; here the scale, and then its nested 8-bit code, is chosen among candidates to minimize that error. Every reader
decodes the result with the ordinary formula.

A scale may be negative: NF4 has eight levels above zero and seven below, and a negative scale swaps the two sides.

Sums run over sixteen lanes that are added in one fixed order, so that the compiler can use vectors and the results
depend neither on the machine nor on the number of threads.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from typing import TypeAlias

import numpy as np

from adaptkit.errors import UsageError
from adaptkit.numerics.absmax import (
    GROUP,
    DoubleQuantized,
    check_block_size,
    dequantize_absmax,
    dynamic_levels,
    quantize_absmax,
)
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.finite import check_finite
from adaptkit.numerics.kernels import cpu
from adaptkit.numerics.kernels._cpu_blocks import find
from adaptkit.numerics.kernels._jit import jit
from adaptkit.numerics.kernels._reference_blocks import TINY
from adaptkit.numerics.kernels.codebook import NF4

Constants: TypeAlias = "DoubleQuantized | Array"
"""A weight's scales as stored in a file: doubly quantized, or (M,) float32."""

FLOOR = 1e-4
"""Share of the mean importance that is added to every input, so that an input that was always 0 still counts."""


_POSITIVE = np.linspace(0.5, 1.1, 9).astype(np.float32)
FACTORS = np.concatenate([_POSITIVE, -_POSITIVE])
"""Candidates for a block's scale, as multiples of the block's largest magnitude: (18,) float32."""
REACH = 4
"""How many codes on either side of the nearest nested code are tried."""

LEVELS, BOUNDS = tuple(map(np.float32, NF4.levels)), tuple(map(np.float32, NF4.bounds))
CODES = tuple(map(np.uint8, range(16)))
LEAST_SCALE = np.float32(TINY)
_LEAST, _MOST = np.float32(1e-30), np.float32(1e30)


def weighted_nf4(
    weight: Array, importance: Array, block_size: int = 64, double_quant: bool = True
) -> tuple[Array, Constants]:
    """Quantize a linear's weight to NF4, minimizing the expected error of its outputs.

    Args:
        weight: (out, in), floating point; blocks run along its row-major order and may straddle rows.
        importance: (in,) E[x²] of each input, not negative, in any unit.
        block_size: weights sharing one scale; a power of two from 32 to 4096.
        double_quant: whether to quantize the scales too.

    Returns:
        codes: (ceil(N / 2),) uint8, two per byte: the nearest levels for the decoded scales.
        constants: the scales. Their weighted error is at most that of plain NF4 stored in the same way.

    Raises:
        NonFiniteError: a weight or an importance is NaN or infinite.
        UsageError: the shapes do not match, an importance is negative, or the block size is not supported.

    Source: the weighted error is that of AWQ (arXiv:2306.00978) and of llama.cpp's importance matrix, for one scale a
    block; here for the NF4 grid, with signed scales and the choice of the nested code.
    """
    flat, important = prepare(weight, importance)
    scales = search_scales(flat, important, block_size)
    _, absmax, _ = cpu.encode_4bit(flat, block_size, NF4)
    choices: list[Constants] = [scales, absmax]
    if double_quant:
        choices = [nest_scales(flat, important, scales, block_size), quantize_absmax(absmax)]
    # In a group with very unequal blocks, quantizing the searched scales may lose more than the search gained.
    decoded = [dequantize_absmax(choice) for choice in choices]
    errors = [_total_error(flat, important, block_size, found, scratch_for(block_size)) for found in decoded]
    best = 0 if errors[0] <= errors[1] else 1
    return encode_at(flat, decoded[best], block_size), choices[best]


def nf4_error(weight: Array, codes: Array, constants: Constants, block_size: int = 64) -> Array:
    """Return the quantization error W − Q in float32, in the weight's shape; Q is the dequantized weight.

    Args:
        weight: (out, in).
        codes: as ``weighted_nf4`` returns them.
        constants: as ``weighted_nf4`` returns them.
        block_size: weights sharing one scale.
    """
    absmax, float32 = dequantize_absmax(constants), np.dtype(np.float32)
    decoded = cpu.decode_4bit(codes, absmax, weight.size, block_size, NF4, float32)
    error: Array = weight.astype(np.float32) - decoded.reshape(weight.shape)
    return error


def prepare(weight: Array, importance: Array) -> tuple[Array, Array]:
    """Check a weight and the importance of its inputs, and convert them for the functions below.

    Arguments and errors are those of ``weighted_nf4``.

    Returns:
        flat: (N,) float32, the weight in row-major order.
        important: (in,) float32 in (0, 1], with the floor, divided by the maximum; all 1 if the importance is all 0.
    """
    if weight.ndim != 2 or importance.shape != weight.shape[1:]:
        raise UsageError(
            f"importance of shape {list(importance.shape)} does not fit a weight of shape {list(weight.shape)}",
            hint="give one value for each input of the linear layer",
        )
    check_finite(weight)
    check_finite(importance)
    if bool((importance < 0).any()):
        raise UsageError("importance: must not be negative", hint="give the mean squares of the inputs")
    values = importance.astype(np.float64)
    values += FLOOR * values.mean()
    important = values / values.max() if values.any() else np.ones_like(values)
    return np.ascontiguousarray(weight, np.float32).reshape(-1), important.astype(np.float32)


def search_scales(flat: Array, important: Array, block_size: int = 64) -> Array:
    """Choose each block's scale, before the scales themselves are quantized.

    Arguments are the results of ``prepare``. Rows from a block boundary on can be searched separately.

    Returns:
        (ceil(N / block_size),) float32; of candidates with equal error the first; 1e-38 for a block of zeros.
    """
    check_block_size(block_size)
    scales = np.empty(-(-flat.size // block_size), np.float32)
    _search(flat, important, block_size, FACTORS, scratch_for(block_size), scales)
    return scales


def nest_scales(flat: Array, important: Array, scales: Array, block_size: int = 64) -> DoubleQuantized:
    """Quantize scales to 8 bits, choosing for each block the code with the least weighted error.

    Args:
        flat: the whole weight, since offset and nested scales are computed over all of it; see ``prepare``.
        important: see ``prepare``.
        scales: (M,) float32, of either sign.
        block_size: weights sharing one scale.
    """
    signed = bool((scales < 0).any())
    nested = _quantize_signed(scales) if signed else quantize_absmax(scales)
    _choose_codes(
        flat, important, block_size, dynamic_levels(), nested.nested_absmax, np.float32(nested.offset), REACH, signed,
        scratch_for(block_size), nested.codes,
    )  # fmt: skip
    return nested


def _quantize_signed(scales: Array) -> DoubleQuantized:
    """Quantize scales of either sign as ``quantize_absmax`` does, to the nearest code even if the sign changes."""
    offset = np.float32(np.cumsum(scales, dtype=np.float64)[-1] / scales.size)
    groups = np.pad(scales - offset, (0, -scales.size % GROUP)).reshape(-1, GROUP)
    nested, levels = np.abs(groups).max(axis=1), dynamic_levels()
    unit = (groups / np.maximum(nested, np.finfo(np.float32).tiny)[:, None]).reshape(-1)[: scales.size]
    codes = np.searchsorted((levels[:-1] + levels[1:]) / np.float32(2), unit).astype(np.uint8)
    return DoubleQuantized(codes, nested, float(offset))


def encode_at(flat: Array, scales: Array, block_size: int) -> Array:
    """Return the nearest NF4 codes for given scales: (ceil(N / 2),) uint8."""
    codes = np.empty(flat.size, np.uint8)
    _encode(flat, scales, block_size, codes)
    return packed(codes)


def packed(codes: Array) -> Array:
    """Pack codes, two per byte, the earlier one in the high nibble; an odd number is filled with the code of zero."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(NF4.zero))
    return (flat[::2] << 4) | flat[1::2]


def scratch_for(block_size: int) -> tuple[Array, Array, Array]:
    """Make scratch arrays for the loops: a padded block, its importance, and the sixteen lanes."""
    width = -(-block_size // 16) * 16
    return np.empty(width, np.float32), np.empty(width, np.float32), np.empty(16, np.float32)


@jit
def _load_block(flat, importance, block, block_size, x, h):
    """Write a block divided by its largest magnitude (at least ``TINY``) to ``x``, and its importance to ``h``.

    Both are padded with zeros. Returns the divisor.
    """
    start = block * block_size
    size = min(block_size, flat.size - start)
    largest = LEAST_SCALE
    for i in range(start, start + size):
        largest = max(largest, abs(flat[i]))
    x[:] = 0
    h[:] = 0
    column = start % importance.size
    for i in range(size):
        x[i] = flat[start + i] / largest
        h[i] = importance[column]
        column = column + 1 if column + 1 < importance.size else 0
    return largest


@jit
def _block_error(x, h, factor, lanes):
    """Return Σ h (x - level · factor)² for the nearest levels; x has a multiple of sixteen elements."""
    reciprocal = np.float32(1) / factor
    lanes[:] = 0
    for start in range(0, x.size, 16):
        for lane in range(16):
            value = x[start + lane]
            error = value - find(value * reciprocal, BOUNDS, LEVELS) * factor
            lanes[lane] += h[start + lane] * error * error
    for width in (8, 4, 2, 1):
        for lane in range(width):
            lanes[lane] += lanes[lane + width]
    return lanes[0]


@jit
def _within(factor):
    """Clamp the magnitude of a factor so that dividing by it does not overflow; keep its sign."""
    size = min(max(abs(factor), _LEAST), _MOST)
    return -size if factor < 0 else size


@jit
def _search(flat, importance, block_size, factors, room, scales):
    """Set each block's scale to its largest magnitude times the best of ``factors``, the earlier one at a tie."""
    x, h, lanes = room
    for block in range(scales.size):
        largest = _load_block(flat, importance, block, block_size, x, h)
        best, least = factors[0], np.float32(np.inf)
        for factor in factors:
            error = _block_error(x, h, factor, lanes)
            if error < least:
                best, least = factor, error
        scales[block] = best * largest if largest > LEAST_SCALE else largest


@jit
def best_code(flat, importance, block, block_size, levels, nested, offset, first, reach, signed, room):
    """Return the nested code, at most ``reach`` away from ``first``, whose constant fits a block best.

    Unless ``signed``, codes other than ``first`` whose constant is not positive are skipped.
    """
    x, h, lanes = room
    largest = _load_block(flat, importance, block, block_size, x, h)
    best, least = first, np.float32(np.inf)
    for step in range(2 * reach + 1):
        code = first + (step + 1) // 2 * (1 if step % 2 else -1)  # first, first + 1, first - 1, ...
        if code < 0 or code > 255:
            continue
        factor = (np.float32(levels[code] * nested) + offset) / largest
        if step and not signed and factor <= 0:
            continue
        error = _block_error(x, h, _within(factor), lanes)
        if error < least:
            best, least = code, error
    return best


@jit
def _choose_codes(flat, importance, block_size, levels, nested, offset, reach, signed, room, codes):
    """Replace each block's nested code with the one that ``best_code`` finds."""
    for block in range(codes.size):
        group, first = nested[block // GROUP], np.int64(codes[block])
        codes[block] = best_code(flat, importance, block, block_size, levels, group, offset, first, reach, signed, room)


@jit
def _total_error(flat, importance, block_size, scales, room):
    """Return the weighted squared error of all blocks at given scales, in float64."""
    x, h, lanes = room
    total = 0.0
    for block in range(scales.size):
        largest = _load_block(flat, importance, block, block_size, x, h)
        error = _block_error(x, h, _within(scales[block] / largest), lanes)
        total += np.float64(error) * np.float64(largest) * np.float64(largest)
    return total


@jit
def _encode(flat, scales, block_size, codes):
    """Write the nearest codes at given scales; as in plain NF4, a short last block is scaled by a true division."""
    for block in range(scales.size):
        start, stop = block * block_size, (block + 1) * block_size
        scale = LEAST_SCALE if abs(scales[block]) < LEAST_SCALE else scales[block]
        reciprocal = np.float32(1) / scale
        for i in range(start, min(stop, flat.size)):
            scaled = flat[i] * reciprocal if stop <= flat.size else flat[i] / scale
            codes[i] = find(scaled, BOUNDS, CODES)
