"""Double quantization: the absmax constants are quantized themselves, to 8 bits in groups of 256.

    absmax (M,) float32  ->  codes (M,) uint8, nested_absmax (ceil(M / 256),) float32, offset: one float32

The 256 levels are the signed dynamic map of Dettmers (arXiv:1511.04561): a decimal exponent and a linear fraction.
bitsandbytes 0.50 finds a level through a table of 65,536 entries, which is off the nearest one for some values;
this module does the same, so that the bytes agree.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

GROUP = 256
"""Constants that share one constant of their own."""


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
def dynamic_map() -> Tensor:
    """The 256 levels: (256,) float32, ascending; level 127 is 0 and level 255 is 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1, -1):
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
    """Quantize absmax constants.

    Args:
        absmax: (M,) float32, finite, M > 0.

    Source: QLoRA (arXiv:2305.14314), section 3, as bitsandbytes 0.50 computes it on a CPU, but with the offset a
    float64 sum in ascending order, rounded once: torch's own mean depends on the number of threads; and with the
    next larger code where a constant would decode to a negative number.
    """
    count = absmax.numel()
    offset = np.float32(np.cumsum(absmax.cpu().numpy(), dtype=np.float64)[-1] / count)
    centred = absmax - float(offset)
    padded = torch.nn.functional.pad(centred, (0, -count % GROUP)).view(-1, GROUP)
    nested = padded.abs().amax(dim=1)
    reciprocal = torch.where(nested > 0, 1.0 / nested, torch.zeros_like(nested))
    scaled = (padded * reciprocal.unsqueeze(1)).clamp(-1, 1).view(-1)[:count]
    index = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).to(torch.int32)
    codes = _lookup().to(absmax.device)[index]
    codes[(nested == 0).repeat_interleave(GROUP)[:count]] = 0
    quantized = DoubleQuantized(codes, nested, float(offset))
    # A small constant beside a large one may decode to less than zero, which would flip the signs of its block.
    while bool((negative := dequantize_absmax(quantized) < 0).any()):
        codes[negative] += 1
    return quantized


def dequantize_absmax(quantized: DoubleQuantized, levels: Tensor | None = None) -> Tensor:
    """Undo ``quantize_absmax`` up to rounding: (M,) float32.

    Args:
        quantized: the constants.
        levels: (256,) float32 map to use instead of the usual one; files may bring their own.
    """
    levels = dynamic_map() if levels is None else levels
    scale = quantized.nested_absmax.repeat_interleave(GROUP)[: quantized.codes.numel()]
    return levels.to(scale.device)[quantized.codes.int()] * scale + quantized.offset
