"""4-bit floating point: a sign, two exponent bits and one fraction bit, two codes per byte."""

from __future__ import annotations

from typing import Any

from adaptkit.numerics.arrays import DType, Values
from adaptkit.numerics.formats import _four_bit
from adaptkit.numerics.formats._blockwise import Blockwise, Format
from adaptkit.numerics.kernels.codebook import FP4


def quantize(weight: Values, block_size: int = 64, measure: bool = False) -> Blockwise:
    """Map each weight to its nearest FP4 level after scaling its block to [-1, 1].

    Arguments, return value and errors are those of ``nf4.quantize``. A small positive weight gets the second zero,
    code 8.

    Source: bitsandbytes 0.50, which gives the same bytes; see ``kernels.reference.encode_4bit``.
    """
    return _four_bit.quantize(FP4, weight, block_size, measure)


def dequantize(quantized: Blockwise, dtype: DType) -> Any:
    """Return level times absmax in float32, rounded once to ``dtype``, in the weight's shape."""
    return _four_bit.dequantize(FP4, quantized, dtype)


FORMAT = Format(name="fp4", bits=4, levels=FP4.levels, quantize=quantize, dequantize=dequantize)
