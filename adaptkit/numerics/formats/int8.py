"""Block-wise int8 absmax: each block is scaled so that its largest magnitude becomes 127."""

import torch
from torch import Tensor

from adaptkit.errors import UsageError
from adaptkit.numerics.finite import check_finite
from adaptkit.numerics.formats._blockwise import Blockwise, Format


def quantize(weight: Tensor, block_size: int = 64) -> Blockwise:
    """Round ``127 / absmax · weight`` to the nearest integer, ties to even, block by block.

    Args:
        weight: any shape, floating point, N elements, taken in row-major order.
        block_size: weights sharing one scale, at least 1.

    Returns:
        codes (N,) int8 and absmax (ceil(N / block_size),) float32; a zero block has absmax 0 and codes 0.

    Raises:
        NonFiniteError: a weight is NaN or infinite; names its index.
        UsageError: the block size is less than 1.

    Source: absmax quantization as in LLM.int8() (arXiv:2208.07339), applied to blocks instead of rows.
    """
    if block_size < 1:
        raise UsageError(f"block size {block_size}: must be at least 1")
    check_finite(weight)
    flat = weight.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    factor = scales(absmax).unsqueeze(1)
    # Below 4e-37 the factor overflows, so such a block is divided by its absmax first.
    scaled = torch.where(factor.isinf(), blocks / absmax.unsqueeze(1) * 127.0, blocks * factor)
    codes = scaled.round().clamp(-127, 127).to(torch.int8).view(-1)[: flat.numel()]
    return Blockwise(codes, absmax, tuple(weight.shape), block_size)


def scales(absmax: Tensor) -> Tensor:
    """The factor of each block: 127 / absmax, 0 for a zero block, and infinite where that overflows."""
    return torch.where(absmax > 0, 127.0 / absmax, torch.zeros_like(absmax))


def dequantize(quantized: Blockwise, dtype: torch.dtype) -> Tensor:
    """Code times absmax / 127 in float32, rounded once to ``dtype``, in the weight's shape."""
    step = (quantized.absmax / 127.0).repeat_interleave(quantized.block_size)[: quantized.count]
    return (quantized.codes.float() * step).to(dtype).view(quantized.shape)


FORMAT = Format(bits=8, quantize=quantize, dequantize=dequantize)
