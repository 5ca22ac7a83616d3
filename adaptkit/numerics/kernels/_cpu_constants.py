"""``encode_constants`` and ``decode_constants`` of ``reference``, compiled."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np
import torch
from torch import Tensor

from adaptkit.numerics.kernels._cpu_memory import jit
from adaptkit.numerics.kernels._reference_blocks import GROUP


@jit
def _encode(absmax, lookup, levels, codes, nested):
    one, half, top = np.float32(1), np.float32(0.5), np.float32(65535)
    total = 0.0
    for i in range(absmax.size):
        total += absmax[i]
    offset = np.float32(total / absmax.size)
    for group in range(nested.size):
        constants = absmax[group * GROUP : (group + 1) * GROUP]
        out = codes[group * GROUP : (group + 1) * GROUP]
        largest = np.float32(0)
        for i in range(constants.size):
            largest = max(largest, abs(constants[i] - offset))
        nested[group] = largest
        if largest == 0:
            out[:] = 0
            continue
        reciprocal = one / largest
        for i in range(constants.size):
            scaled = min(max((constants[i] - offset) * reciprocal, -one), one)
            code = lookup[np.int32((scaled + one) * half * top + half)]
            while levels[code] * largest + offset < 0:
                code += 1
            out[i] = code
    return offset


def encode_constants(absmax: Tensor, lookup: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, float]:
    """See ``reference.encode_constants``."""
    codes = torch.empty(absmax.numel(), dtype=torch.uint8)
    nested = torch.empty(-(-absmax.numel() // GROUP), dtype=torch.float32)
    arrays = (tensor.contiguous().numpy() for tensor in (absmax, lookup, levels, codes, nested))
    return codes, nested, float(_encode(*arrays))


@jit
def decode_groups(codes, nested, offset, levels, absmax):
    """``decode_constants`` of arrays, into ``absmax``: (M,) float32."""
    for group in range(nested.size):
        scale = nested[group]
        for i in range(group * GROUP, min((group + 1) * GROUP, codes.size)):
            absmax[i] = levels[codes[i]] * scale + offset


def decode_constants(codes: Tensor, nested_absmax: Tensor, offset: float, levels: Tensor) -> Tensor:
    """See ``reference.decode_constants``."""
    absmax = torch.empty(codes.numel(), dtype=torch.float32)
    arrays = codes.reshape(-1).contiguous().numpy(), nested_absmax.contiguous().numpy()
    decode_groups(*arrays, np.float32(offset), levels.contiguous().numpy(), absmax.numpy())
    return absmax
