"""Double quantization: the absmax constants are quantized themselves, to 8 bits in groups of 256.

    absmax (M,) float32  ->  codes (M,) uint8, nested_absmax (ceil(M / 256),) float32, offset: one float32

The 256 levels are the signed dynamic map of Dettmers (arXiv:1511.04561): a decimal exponent and a linear fraction.
bitsandbytes 0.50 finds a level through a table of 65,536 entries, which is off the nearest one for some values;
this module does the same, so that the bytes agree.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.kernels._reference_blocks import GROUP

__all__ = ["GROUP", "DoubleQuantized", "dequantize_absmax", "dynamic_map", "quantize_absmax"]


@dataclass(frozen=True)
class DoubleQuantized:
    """Quantized absmax constants.

    Attributes:
        codes: (M,) uint8.
        nested_absmax: (ceil(M / GROUP),) float32.
        offset: a float32 value, the mean of the constants.
    """

    codes: Tensor
    nested_absmax: Tensor
    offset: float


@cache
def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 levels: (256,) float32, ascending; level 127 is 0 and level 255 is 1.

    Args:
        signed: otherwise there are twice as many fractions and no sign, and level 0 is 0.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1, -1) if signed else (1,):
            values += (sign * 10 ** (exponent - 6) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _lookup() -> Tensor:
    """The level chosen for each of 65,536 evenly spaced values in [-1, 1]."""
    levels = dynamic_map()
    middles = (levels[:-1] + levels[1:]) * 0.5
    values = torch.arange(65536, dtype=torch.float32) * (2.0 / 65535) - 1.0
    return torch.bucketize(values, middles).to(torch.uint8)


def quantize_absmax(absmax: Tensor) -> DoubleQuantized:
    """Quantize absmax constants; see ``kernels.reference.encode_constants``.

    Args:
        absmax: (M,) float32, finite, M > 0.
    """
    kernels, where = kernels_for(absmax.device), absmax.device
    return DoubleQuantized(*kernels.encode_constants(absmax, _lookup().to(where), dynamic_map().to(where)))


def dequantize_absmax(quantized: DoubleQuantized, levels: Tensor | None = None) -> Tensor:
    """Undo ``quantize_absmax`` up to rounding: (M,) float32.

    Args:
        quantized: the constants.
        levels: (256,) float32 map to use instead of the usual one; files may bring their own.
    """
    codes = quantized.codes
    levels = (dynamic_map() if levels is None else levels).to(codes.device)
    kernels = kernels_for(codes.device)
    return kernels.decode_constants(codes, quantized.nested_absmax, quantized.offset, levels)
