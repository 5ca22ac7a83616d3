"""The absmax constants of blocks of weights, and double quantization: to 8 bits in groups of 256.

    absmax (M,) float32  ->  codes (M,) uint8, nested_absmax (ceil(M / 256),) float32, offset: one float32

The 256 levels are the signed dynamic map of Dettmers (arXiv:1511.04561): a decimal exponent and a linear fraction.
bitsandbytes 0.50 finds a level in a table of 65,536 entries, which for some values does not give the nearest level;
this module does the same to produce the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from adaptkit.errors import UsageError
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels._reference_blocks import GROUP

__all__ = [
    "GROUP",
    "DoubleQuantized",
    "check_block_size",
    "dequantize_absmax",
    "dynamic_levels",
    "quantize_absmax",
    "squared_errors",
]


@dataclass(frozen=True)
class DoubleQuantized:
    """Quantized absmax constants.

    Attributes:
        codes: (M,) uint8.
        nested_absmax: (ceil(M / GROUP),) float32.
        offset: mean of the constants, a float32 value.
    """

    codes: Array
    nested_absmax: Array
    offset: float


@cache
def dynamic_levels(signed: bool = True) -> Array:
    """Return the 256 levels, (256,) float32, ascending; level 127 is 0 and level 255 is 1.

    Args:
        signed: whether there are negative levels; if not, there are twice as many fractions and level 0 is 0.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _edges(2 ** (exponent + (not signed)))
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        for sign in (1, -1) if signed else (1,):
            values += (np.float32(sign * 10 ** (exponent - 6)) * middles).tolist()
    return np.array(sorted(values), np.float32)


def _edges(count: int) -> Array:
    """Return 0.1 to 1 in equal steps, each counted from the nearer end and rounded once, as in ``torch.linspace``."""
    first, last = np.float32(0.1), np.float32(1)
    step, places = np.float64((last - first) / np.float32(count)), np.arange(count + 1)
    return np.where(places < (count + 1) // 2, first + step * places, last - step * (count - places)).astype(np.float32)


@cache
def _lookup() -> Array:
    """Return the code for each of 65,536 evenly spaced values in [-1, 1]: (65536,) uint8."""
    levels = dynamic_levels()
    middles = (levels[:-1] + levels[1:]) * np.float32(0.5)
    values = np.arange(65536, dtype=np.float32) * np.float32(2.0 / 65535) - np.float32(1)
    return np.searchsorted(middles, values).astype(np.uint8)


def quantize_absmax(absmax: Array) -> DoubleQuantized:
    """Quantize absmax constants; see ``kernels.reference.encode_constants``.

    Args:
        absmax: (M,) float32, finite, M > 0.
    """
    from adaptkit.numerics.kernels import cpu  # here, as below, since it loads numba

    return DoubleQuantized(*cpu.encode_constants(absmax, _lookup(), dynamic_levels()))


def dequantize_absmax(absmax: DoubleQuantized | Array, levels: Array | None = None) -> Array:
    """Undo ``quantize_absmax`` up to rounding: (M,) float32.

    Args:
        absmax: the quantized constants; constants that are not quantized are returned as they are.
        levels: (256,) float32 levels from a file that has its own; None for ``dynamic_levels``.
    """
    if not isinstance(absmax, DoubleQuantized):
        return absmax
    from adaptkit.numerics.kernels import cpu

    levels = dynamic_levels() if levels is None else levels
    return cpu.decode_constants(absmax.codes, absmax.nested_absmax, absmax.offset, levels)


def squared_errors(squares: float, moments: Array, absmax: Array) -> float:
    """Return Σ (w - q)² over the weights of M blocks; never negative, despite rounding.

    Args:
        squares: Σ w² over these weights.
        moments: (M, 2), contiguous: the other two moments of each block, see ``Blockwise``.
        absmax: (M,) float32, the final constants of the blocks.
    """
    from adaptkit.numerics.kernels._cpu_blocks import sum_errors

    return max(0.0, squares + float(sum_errors(moments, absmax)))


def check_block_size(block_size: int) -> None:
    """Raise an error for a block size that readers of the format do not accept.

    Raises:
        UsageError: not a power of two from 32 to 4096.
    """
    if block_size < 32 or block_size > 4096 or block_size & (block_size - 1):
        raise UsageError(
            f"block_size: must be a power of two from 32 to 4096, found {block_size}", hint="64 is the default"
        )
