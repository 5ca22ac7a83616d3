"""The 4-bit formats: two codes per byte, and levels from a codebook."""

from __future__ import annotations

from functools import partial
from typing import Any

from adaptkit.formats._blockwise import Blockwise, Format, check_blocks_finite
from adaptkit.numerics.absmax import check_block_size
from adaptkit.numerics.arrays import DType, Values
from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.kernels.codebook import Codebook


def four_bit(name: str, book: Codebook) -> Format:
    """Return the format that has a codebook's levels."""
    return Format(name, 4, book.levels, partial(_quantize, book), partial(_dequantize, book))


def _quantize(book: Codebook, weight: Values, block_size: int = 64, measure: bool = False) -> Blockwise:
    """Map each weight to its nearest level after scaling its block to [-1, 1].

    Args:
        book: the levels.
        weight: any shape, floating point, N elements, taken in row-major order.
        block_size: number of weights that share one scale; a power of two from 32 to 4096.
        measure: whether to return the moments of each block too.

    Returns:
        codes (ceil(N / 2),) uint8, the earlier weight in the high nibble, and absmax (ceil(N / block_size),) float32.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the message has its index.
        UsageError: the block size is not such a power of two.

    Source: bitsandbytes 0.50, which gives the same bytes; see ``kernels.reference.encode_4bit``.
    """
    check_block_size(block_size)
    codes, absmax, moments = kernels_for(weight).encode_4bit(weight, block_size, book, measure)
    check_blocks_finite(weight, absmax)
    return Blockwise(codes, absmax, tuple(weight.shape), block_size, moments)


def _dequantize(book: Codebook, quantized: Blockwise, dtype: DType) -> Any:
    """Return level times absmax in float32, rounded once to ``dtype``, in the weight's shape."""
    parts = quantized.codes, quantized.absmax, quantized.count, quantized.block_size
    return kernels_for(quantized.codes).decode_4bit(*parts, book, dtype).reshape(quantized.shape)
