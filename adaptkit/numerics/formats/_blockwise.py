"""What block-wise formats share: flatten, cut into blocks, one constant (absmax) a block.

An outlier then spoils only its own block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.errors import UsageError


@dataclass(frozen=True)
class Blockwise:
    """A quantized tensor.

    Attributes:
        codes: uint8 or int8; how many weights a byte holds is the format's affair.
        absmax: (ceil(N / block_size),) float32, in the weight's units.
        shape: of the weight, N elements in row-major order.
        block_size: weights sharing one absmax.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    block_size: int

    @property
    def count(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Format:
    """A quantization format: how to encode a weight, and how to decode it.

    Attributes:
        bits: of a code.
        quantize: (weight, block_size) -> ``Blockwise``; raises ``NonFiniteError`` or ``UsageError``.
        dequantize: (quantized, dtype) -> the weight in its shape.
    """

    bits: int
    quantize: Callable[[Tensor, int], Blockwise]
    dequantize: Callable[[Blockwise, torch.dtype], Tensor]


def check_block_size(block_size: int) -> None:
    """Refuse a block size that no reader of the format takes.

    Raises:
        UsageError: not a power of two from 32 to 4096.
    """
    if block_size < 32 or block_size > 4096 or block_size & (block_size - 1):
        raise UsageError(f"block size {block_size}: must be a power of two from 32 to 4096", hint="the usual one is 64")
