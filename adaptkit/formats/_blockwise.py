"""Shared parts of the block-wise formats: a flattened weight is cut into blocks, each with one constant (absmax).

So an outlier reduces the precision of its own block only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from adaptkit.numerics.arrays import DType, Values, as_array, cast
from adaptkit.numerics.finite import all_finite, check_finite


@dataclass(frozen=True)
class Blockwise:
    """A quantized tensor.

    Attributes:
        codes: uint8 or int8; how many weights a byte holds depends on the format.
        absmax: (ceil(N / block_size),) float32, in the weight's units.
        shape: shape of the weight, which has N elements in row-major order.
        block_size: number of weights that share one absmax.
        moments: (ceil(N / block_size), 3) float32, or None if not requested. With x a weight and l the level of its
            code, each block's Σ x², Σ x l and Σ l²: its squared error with any constant a is
            Σ x² - 2 a Σ x l + a² Σ l². Meaningless where the squares overflow or underflow float32, that is for
            weights beyond 1e18 or all below 1e-18.
    """

    codes: Any
    absmax: Any
    shape: tuple[int, ...]
    block_size: int
    moments: Any = None

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class Quantize(Protocol):
    """Encodes a weight."""

    def __call__(self, weight: Values, block_size: int = 64, measure: bool = False) -> Blockwise:
        """Encode a weight, with its moments if ``measure``; may raise ``NonFiniteError`` or ``UsageError``."""
        ...


class Dequantize(Protocol):
    """Decodes a weight."""

    def __call__(self, quantized: Blockwise, dtype: DType) -> Any:
        """Return the weight in its shape, rounded once to bfloat16, float16 or float32; an array if the codes are."""
        ...


@dataclass(frozen=True)
class Format:
    """A quantization format: how to encode a weight, and how to decode it.

    Attributes:
        name: name in files and on the command line.
        bits: bits per code.
        levels: level of each 4-bit code, to be multiplied by the block's constant (``quant_map`` in files); None if
            codes are integers.
        quantize: encodes a weight.
        dequantize: decodes a weight.
    """

    name: str
    bits: int
    levels: tuple[float, ...] | None
    quantize: Quantize
    dequantize: Dequantize


def check_blocks_finite(weight: Values, absmax: Values) -> None:
    """Raise an error if a weight has elements that are not finite; elements are searched only if a constant is not.

    Raises:
        NonFiniteError: names the index of the first such element.
    """
    if not all_finite(absmax):
        check_finite(cast(as_array(weight), np.float32))
