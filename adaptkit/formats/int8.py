"""Block-wise int8 absmax quantization: each block is scaled so that its largest magnitude becomes 127."""

from __future__ import annotations

from typing import Any

from adaptkit.errors import UsageError
from adaptkit.formats._blockwise import Blockwise, Format, check_blocks_finite
from adaptkit.numerics.arrays import DType, Values
from adaptkit.numerics.kernels import kernels_for


def quantize(weight: Values, block_size: int = 64, measure: bool = False) -> Blockwise:
    """Round ``127 / absmax · weight`` to the nearest integer, ties to even, block by block.

    Args:
        weight: any shape, floating point, N elements, taken in row-major order.
        block_size: number of weights that share one scale, at least 1.
        measure: whether to return the moments of each block too; the level of a code is code / 127.

    Returns:
        codes (N,) int8 and absmax (ceil(N / block_size),) float32; a zero block has absmax 0 and codes 0.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the message has its index.
        UsageError: the block size is less than 1.

    Source: absmax quantization as in LLM.int8() (arXiv:2208.07339), applied to blocks instead of rows.
    """
    if block_size < 1:
        raise UsageError(f"block_size: must be at least 1, found {block_size}")
    codes, absmax, moments = kernels_for(weight).encode_8bit(weight, block_size, measure)
    check_blocks_finite(weight, absmax)
    return Blockwise(codes, absmax, tuple(weight.shape), block_size, moments)


def dequantize(quantized: Blockwise, dtype: DType) -> Any:
    """Return code times absmax / 127 in float32, rounded once to ``dtype``, in the weight's shape."""
    parts = quantized.codes, quantized.absmax, quantized.count, quantized.block_size
    return kernels_for(quantized.codes).decode_8bit(*parts, dtype).reshape(quantized.shape)


FORMAT = Format(name="int8", bits=8, levels=None, quantize=quantize, dequantize=dequantize)
