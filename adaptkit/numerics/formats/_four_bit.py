"""What the 4-bit formats share: two codes a byte, and levels from a codebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.lazy import torch
from adaptkit.numerics.arrays import Values, as_tensor
from adaptkit.numerics.formats._blockwise import Blockwise, check_block_size, check_blocks_finite
from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.kernels.codebook import Codebook

if TYPE_CHECKING:
    from torch import Tensor


def quantize(book: Codebook, weight: Values, block_size: int, measure: bool) -> Blockwise:
    """Map each weight to a level of the codebook; see ``nf4.quantize``."""
    check_block_size(block_size)
    codes, absmax, moments = kernels_for(weight).encode_4bit(weight, block_size, book, measure)
    check_blocks_finite(weight, absmax)
    return Blockwise(codes, absmax, tuple(weight.shape), block_size, moments)


def dequantize(book: Codebook, quantized: Blockwise, dtype: torch.dtype) -> Tensor:
    """Level times absmax in float32, rounded once to ``dtype``, in the weight's shape."""
    codes, absmax = as_tensor(quantized.codes), as_tensor(quantized.absmax)
    flat = kernels_for(codes).decode_4bit(codes, absmax, quantized.count, quantized.block_size, book, dtype)
    return flat.view(quantized.shape)
