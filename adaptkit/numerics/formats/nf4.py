"""4-bit NormalFloat: sixteen levels at the quantiles of a normal distribution, two codes per byte."""

from __future__ import annotations

from typing import Any

from adaptkit.numerics.arrays import DType, Values
from adaptkit.numerics.formats import _four_bit
from adaptkit.numerics.formats._blockwise import Blockwise, Format
from adaptkit.numerics.kernels.codebook import NF4


def quantize(weight: Values, block_size: int = 64, measure: bool = False) -> Blockwise:
    """Map each weight to its nearest NF4 level after scaling its block to [-1, 1].

    Args:
        weight: any shape, floating point, N elements, taken in row-major order.
        block_size: number of weights that share one scale; a power of two from 32 to 4096.
        measure: whether to return the moments of each block too.

    Returns:
        codes (ceil(N / 2),) uint8, the earlier weight in the high nibble, and absmax (ceil(N / block_size),) float32.

    Raises:
        NonFiniteError: a weight is NaN or infinite; the message has its index.
        UsageError: the block size is not such a power of two.

    Source: QLoRA (arXiv:2305.14314), as bitsandbytes 0.50 rounds it; see ``kernels.reference.encode_4bit``.
    """
    return _four_bit.quantize(NF4, weight, block_size, measure)


def dequantize(quantized: Blockwise, dtype: DType) -> Any:
    """Return level times absmax in float32, rounded once to ``dtype``, in the weight's shape."""
    return _four_bit.dequantize(NF4, quantized, dtype)


FORMAT = Format(name="nf4", bits=4, levels=NF4.levels, quantize=quantize, dequantize=dequantize)
