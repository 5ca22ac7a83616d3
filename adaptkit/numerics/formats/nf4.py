"""4-bit NormalFloat: sixteen levels at the quantiles of a normal distribution, two codes a byte."""

import torch
from torch import Tensor

from adaptkit.numerics.finite import check_finite
from adaptkit.numerics.formats._blockwise import Blockwise, Format, check_block_size
from adaptkit.numerics.kernels import kernels_for


def quantize(weight: Tensor, block_size: int = 64) -> Blockwise:
    """Map each weight to its nearest NF4 level after scaling its block to [-1, 1].

    Args:
        weight: any shape, floating point, N elements, taken in row-major order.
        block_size: weights sharing one scale; a power of two from 32 to 4096.

    Returns:
        codes (ceil(N / 2),) uint8, the earlier weight in the high nibble, and absmax (ceil(N / block_size),) float32.

    Raises:
        NonFiniteError: a weight is NaN or infinite; names its index.
        UsageError: the block size cannot be used.

    Source: QLoRA (arXiv:2305.14314), as bitsandbytes 0.50 rounds it; see ``kernels.reference.nf4_encode``.
    """
    check_block_size(block_size)
    check_finite(weight)
    codes, absmax = kernels_for(weight.device).nf4_encode(weight, block_size)
    return Blockwise(codes, absmax, tuple(weight.shape), block_size)


def dequantize(quantized: Blockwise, dtype: torch.dtype) -> Tensor:
    """Level times absmax in float32, rounded once to ``dtype``, in the weight's shape."""
    kernels = kernels_for(quantized.codes.device)
    flat = kernels.nf4_decode(quantized.codes, quantized.absmax, quantized.count, quantized.block_size, dtype)
    return flat.view(quantized.shape)


FORMAT = Format(bits=4, quantize=quantize, dequantize=dequantize)
