"""Activation-weighted scales for NF4: the same format and size, with less error where a linear's inputs are large.

If the errors ΔW of the weights are independent, the expected squared error of y = W x is Σ_ij ΔW_ij² E[x_j²], so each
weight's error counts in proportion to the second moment of its input. Plain NF4 sets each block's scale to its largest
weight; here the scale, and then its nested 8-bit code, is chosen among candidates to minimize that error. Every reader
decodes the result with the ordinary formula.

A scale may be negative: NF4 has eight levels above zero and seven below, and a negative scale swaps the two sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from adaptkit.errors import UsageError
from adaptkit.lazy import lazy_module, torch
from adaptkit.numerics.absmax import (
    GROUP,
    DoubleQuantized,
    check_block_size,
    dequantize_absmax,
    dynamic_map,
    quantize_absmax,
)
from adaptkit.numerics.finite import check_finite
from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.kernels.codebook import NF4

if TYPE_CHECKING:
    from torch import Tensor

_loops = lazy_module("adaptkit.numerics.kernels._cpu_calibration")

Constants: TypeAlias = "DoubleQuantized | Tensor"
"""A weight's scales as stored in a file: doubly quantized, or (M,) float32."""

FLOOR = 1e-4
"""Share of the mean importance that is added to every input, so that an input that was always 0 still counts."""


_POSITIVE = np.linspace(0.5, 1.1, 9).astype(np.float32)
FACTORS = np.concatenate([_POSITIVE, -_POSITIVE])
"""Candidates for a block's scale, as multiples of the block's largest magnitude: (18,) float32."""
REACH = 4
"""How many codes on either side of the nearest nested code are tried."""


def weighted_nf4(
    weight: Tensor,
    importance: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
) -> tuple[Tensor, Constants]:
    """Quantize a linear's weight to NF4, minimizing the expected error of its outputs.

    Args:
        weight: (out, in), floating point, on the CPU; blocks run along its row-major order and may straddle rows.
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
    scales = search_scales(weight, importance, block_size)
    constants: Constants = scales
    _, absmax, _ = kernels_for(weight).encode_4bit(weight, block_size, NF4)
    plain: Constants = absmax
    if double_quant:
        constants = nest_scales(weight, scales, importance, block_size)
        plain = quantize_absmax(absmax)
    # In a group with very unequal blocks, quantizing the searched scales may lose more than the search gained.
    flat, important = _flat(weight), normalized_importance(weight, importance)
    room = _loops.scratch_for(block_size)
    decoded = [dequantize_absmax(choice) for choice in (constants, plain)]
    errors = [_loops.total_error(flat, important, block_size, found.numpy(), room) for found in decoded]
    best = 0 if errors[0] <= errors[1] else 1
    return encode_at(weight, decoded[best], block_size), (constants, plain)[best]


def nf4_error(weight: Tensor, codes: Tensor, constants: Constants, block_size: int = 64) -> Tensor:
    """Return the quantization error W − Q in float32, in the weight's shape; Q is the dequantized weight.

    Args:
        weight: (out, in).
        codes: as ``weighted_nf4`` returns them.
        constants: as ``weighted_nf4`` returns them.
        block_size: weights sharing one scale.
    """
    absmax = dequantize_absmax(constants)
    decoded = kernels_for(codes).decode_4bit(codes, absmax, weight.numel(), block_size, NF4, torch.float32)
    error: Tensor = weight.float() - decoded.view(weight.shape)
    return error


def search_scales(weight: Tensor, importance: Tensor, block_size: int = 64) -> Tensor:
    """Choose each block's scale, before the scales themselves are quantized.

    Arguments and errors are those of ``weighted_nf4``. A slice of rows that starts at a block boundary can be searched
    separately.

    Returns:
        (ceil(N / block_size),) float32; of candidates with equal error the first; 1e-38 for a block of zeros.
    """
    check_block_size(block_size)
    check_finite(weight)
    flat, important = _flat(weight), normalized_importance(weight, importance)
    scales = np.empty(-(-flat.size // block_size), np.float32)
    _loops.search_scales(flat, important, block_size, FACTORS, _loops.scratch_for(block_size), scales)
    return torch.from_numpy(scales)


def nest_scales(weight: Tensor, scales: Tensor, importance: Tensor, block_size: int = 64) -> DoubleQuantized:
    """Quantize scales to 8 bits, choosing for each block the code with the least weighted error.

    Args:
        weight: the whole tensor, since offset and nested scales are computed over all of it.
        scales: (M,) float32, of either sign.
        importance: (in,) E[x²] of each input.
        block_size: weights sharing one scale.
    """
    signed = bool((scales < 0).any())
    nested = _quantize_signed(scales) if signed else quantize_absmax(scales)
    codes = nested.codes.numpy().copy()
    _loops.choose_codes(
        _flat(weight), normalized_importance(weight, importance), block_size, dynamic_map().numpy(),
        nested.nested_absmax.numpy(), np.float32(nested.offset), REACH, signed,
        _loops.scratch_for(block_size), codes,
    )  # fmt: skip
    return DoubleQuantized(torch.from_numpy(codes), nested.nested_absmax, nested.offset)


def encode_at(weight: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Return the nearest NF4 codes for given scales: (ceil(N / 2),) uint8."""
    flat = _flat(weight)
    packed = np.empty((flat.size + 1) // 2, np.uint8)
    _loops.encode_at(flat, scales.numpy(), block_size, np.empty(block_size + 1, np.uint8), packed)
    return torch.from_numpy(packed)


def _flat(weight: Tensor) -> Any:
    return weight.reshape(-1).float().contiguous().numpy()


def normalized_importance(weight: Tensor, importance: Tensor) -> Any:
    """Add the floor to the importance and divide by the maximum: (in,) float32 in (0, 1]; all 1 if it is all 0."""
    if weight.dim() != 2 or importance.shape != weight.shape[1:]:
        raise UsageError(
            f"importance of shape {list(importance.shape)} does not fit a weight of shape {list(weight.shape)}",
            hint="give one value for each input of the linear layer",
        )
    check_finite(importance)
    values = importance.double()
    if bool((values < 0).any()):
        raise UsageError("importance: must not be negative", hint="give the mean squares of the inputs")
    values = values + FLOOR * values.mean()
    largest = values.max()
    return (values / largest if largest > 0 else torch.ones_like(values)).float().contiguous().numpy()


def _quantize_signed(scales: Tensor) -> DoubleQuantized:
    """Quantize scales of either sign as ``quantize_absmax`` does, to the nearest code even if the sign changes."""
    values = scales.numpy()
    offset = float(np.float32(np.cumsum(values, dtype=np.float64)[-1] / values.size))
    groups = torch.nn.functional.pad(scales - offset, (0, -values.size % GROUP)).view(-1, GROUP)
    nested = groups.abs().amax(dim=1)
    levels = dynamic_map()
    unit = (groups / nested.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).view(-1)[: values.size]
    codes = torch.bucketize(unit, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return DoubleQuantized(codes, nested, offset)
