"""Shared parts of the 4-bit formats: two codes per byte, and levels from a codebook."""

from __future__ import annotations

from typing import Any

from adaptkit.numerics.arrays import DType, Values
from adaptkit.numerics.formats._blockwise import Blockwise, check_block_size, check_blocks_finite
from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.kernels.codebook import Codebook


def quantize(book: Codebook, weight: Values, block_size: int, measure: bool) -> Blockwise:
    """Map each weight to a level of the codebook; see ``nf4.quantize``."""
    check_block_size(block_size)
    codes, absmax, moments = kernels_for(weight).encode_4bit(weight, block_size, book, measure)
    check_blocks_finite(weight, absmax)
    return Blockwise(codes, absmax, tuple(weight.shape), block_size, moments)


def dequantize(book: Codebook, quantized: Blockwise, dtype: DType) -> Any:
    """Return level times absmax in float32, rounded once to ``dtype``, in the weight's shape."""
    parts = quantized.codes, quantized.absmax, quantized.count, quantized.block_size
    return kernels_for(quantized.codes).decode_4bit(*parts, book, dtype).reshape(quantized.shape)
