"""``nf4_encode`` and ``nf4_decode`` of ``reference``, compiled."""

import numpy as np
import torch
from torch import Tensor

from adaptkit.numerics.kernels._cpu_memory import as_numpy, jit
from adaptkit.numerics.kernels.reference import NF4_LEVELS, TINY

_LEVELS = np.array(NF4_LEVELS, dtype=np.float32)
_BOUNDS = (_LEVELS[:-1] + _LEVELS[1:]) / np.float32(2)


@jit
def _encode(flat, block_size, bounds, codes, absmax):  # type: ignore[no-untyped-def]
    one, tiny = np.float32(1), np.float32(TINY)
    q = np.empty(block_size + 1, np.uint8)
    for block in range(absmax.size):
        start = block * block_size
        size = min(block_size, flat.size - start)
        largest = np.float32(0)
        for i in range(size):
            largest = max(largest, abs(flat[start + i]))
        divisor = max(largest, tiny)
        reciprocal = one / divisor
        tail = size < block_size
        absmax[block] = divisor if tail else largest
        for i in range(size):
            x = flat[start + i]
            scaled = min(max(x / divisor if tail else x * reciprocal, -one), one)
            level = 0
            for j in range(15):
                level += bounds[j] < scaled
            q[i] = level
        q[size] = 7
        for i in range((size + 1) // 2):
            codes[start // 2 + i] = (q[2 * i] << 4) | q[2 * i + 1]


def nf4_encode(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ``reference.nf4_encode``."""
    flat = weight.reshape(-1).float().contiguous()
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32)
    _encode(flat.numpy(), block_size, _BOUNDS, codes.numpy(), absmax.numpy())
    return codes, absmax


@jit
def _decode_float32(codes, absmax, block_size, levels, out):  # type: ignore[no-untyped-def]
    table = np.empty(16, np.float32)
    for block in range(absmax.size):
        for level in range(16):
            table[level] = levels[level] * absmax[block]
        start = block * block_size
        end = min(start + block_size, out.size)
        for i in range(start // 2, end // 2):
            byte = codes[i]
            out[2 * i] = table[byte >> 4]
            out[2 * i + 1] = table[byte & 15]
        if end % 2:
            out[end - 1] = table[codes[end // 2] >> 4]


@jit
def _decode_bfloat16(codes, absmax, block_size, levels, out):  # type: ignore[no-untyped-def]
    table = np.empty(16, np.uint16)
    for block in range(absmax.size):
        for level in range(16):
            bits = np.float32(levels[level] * absmax[block]).view(np.uint32)
            table[level] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        start = block * block_size
        end = min(start + block_size, out.size)
        for i in range(start // 2, end // 2):
            byte = codes[i]
            out[2 * i] = table[byte >> 4]
            out[2 * i + 1] = table[byte & 15]
        if end % 2:
            out[end - 1] = table[codes[end // 2] >> 4]


def nf4_decode(codes: Tensor, absmax: Tensor, count: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """See ``reference.nf4_decode``."""
    decode, out_dtype = (
        (_decode_bfloat16, torch.bfloat16) if dtype == torch.bfloat16 else (_decode_float32, torch.float32)
    )
    out = torch.empty(count, dtype=out_dtype)
    decode(as_numpy(codes.reshape(-1)), as_numpy(absmax), block_size, _LEVELS, as_numpy(out))
    return out.to(dtype)
