"""What block-wise formats share: flatten, cut into blocks, one constant (absmax) a block.

An outlier then spoils only its own block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from adaptkit.errors import UsageError
from adaptkit.lazy import late
from adaptkit.numerics.arrays import Array, DType, Values, as_array, cast
from adaptkit.numerics.finite import all_finite, check_finite

_loops = late("adaptkit.numerics.kernels._cpu_blocks")


@dataclass(frozen=True)
class Blockwise:
    """A quantized tensor.

    Attributes:
        codes: uint8 or int8; how many weights a byte holds is the format's affair.
        absmax: (ceil(N / block_size),) float32, in the weight's units.
        shape: of the weight, N elements in row-major order.
        block_size: weights sharing one absmax.
        moments: (ceil(N / block_size), 3) float32 if asked for. With x a weight and l the level of its code, each
            block's Σ x², Σ x l and Σ l²: its squared error under any constant a is Σ x² - 2 a Σ x l + a² Σ l².
            Meaningless where the squares leave float32, that is for weights beyond 1e18 or all below 1e-18.
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
        """Raises ``NonFiniteError`` or ``UsageError``; ``measure`` fills in the moments."""
        ...


class Dequantize(Protocol):
    """Decodes a weight."""

    def __call__(self, quantized: Blockwise, dtype: DType) -> Any:
        """The weight in its shape, rounded once to bfloat16, float16 or float32; array or tensor, as its codes are."""
        ...


@dataclass(frozen=True)
class Format:
    """A quantization format: how to encode a weight, and how to decode it.

    Attributes:
        name: in file names and on the command line.
        bits: of a code.
        levels: of each 4-bit code, before its block's constant: the ``quant_map`` of a file. None if codes are numbers.
        quantize: encodes.
        dequantize: decodes.
    """

    name: str
    bits: int
    levels: tuple[float, ...] | None
    quantize: Quantize
    dequantize: Dequantize


def squared_errors(squares: float, moments: Array, absmax: Array) -> float:
    """Σ (w - q)² over the weights of some blocks; at least 0, whatever was rounded.

    Args:
        squares: Σ w² over them.
        moments: (M, 2), the other moments of the blocks, see ``Blockwise``; contiguous.
        absmax: (M,) float32, the constants that the blocks have in the end.
    """
    return max(0.0, squares + float(_loops.sum_errors(moments, absmax)))


def check_block_size(block_size: int) -> None:
    """Refuse a block size that no reader of the format takes.

    Raises:
        UsageError: not a power of two from 32 to 4096.
    """
    if block_size < 32 or block_size > 4096 or block_size & (block_size - 1):
        raise UsageError(
            f"block_size: must be a power of two from 32 to 4096, found {block_size}", hint="64 is the default"
        )


def check_blocks_finite(weight: Values, absmax: Values) -> None:
    """Refuse a weight that was not finite, as its constants tell; only then are the weights looked at one by one.

    Raises:
        NonFiniteError: names the first bad weight's index.
    """
    if not all_finite(absmax):
        check_finite(cast(as_array(weight), np.float32))
