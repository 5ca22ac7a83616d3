"""The absmax constants of blocks of weights, and double quantization: to 8 bits in groups of 256.

    absmax (M,) float32  ->  codes (M,) uint8, nested_absmax (ceil(M / 256),) float32, offset: one float32

The 256 levels are the signed dynamic map of Dettmers (arXiv:1511.04561): a decimal exponent and a linear fraction.
bitsandbytes 0.50 finds a level in a table of 65,536 entries, which for some values does not give the nearest level;
this module does the same to produce the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptkit.errors import UsageError
from adaptkit.lazy import lazy_module
from adaptkit.numerics.arrays import Array, Values, as_array, as_tensor
from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.kernels._reference_blocks import GROUP

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GROUP",
    "DoubleQuantized",
    "as_arrays",
    "check_block_size",
    "dequantize_absmax",
    "dynamic_levels",
    "dynamic_map",
    "quantize_absmax",
    "squared_errors",
]

_loops = lazy_module("adaptkit.numerics.kernels._cpu_blocks")


@dataclass(frozen=True)
class DoubleQuantized:
    """Quantized absmax constants.

    Attributes:
        codes: (M,) uint8.
        nested_absmax: (ceil(M / GROUP),) float32.
        offset: mean of the constants, a float32 value.
    """

    codes: Any
    nested_absmax: Any
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


@cache
def dynamic_map(signed: bool = True) -> Tensor:
    """Return ``dynamic_levels`` as a tensor."""
    return as_tensor(dynamic_levels(signed))


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


def quantize_absmax(absmax: Values) -> DoubleQuantized:
    """Quantize absmax constants; see ``kernels.reference.encode_constants``.

    Args:
        absmax: (M,) float32, finite, M > 0.
    """
    tables = (_beside(absmax, table) for table in (_lookup(), dynamic_levels()))
    return DoubleQuantized(*kernels_for(absmax).encode_constants(absmax, *tables))


def dequantize_absmax(absmax: DoubleQuantized | Values, levels: Values | None = None) -> Any:
    """Undo ``quantize_absmax`` up to rounding: (M,) float32.

    Args:
        absmax: the quantized constants; constants that are not quantized are returned as they are.
        levels: (256,) float32 levels from a file that has its own; None for ``dynamic_levels``.
    """
    if not isinstance(absmax, DoubleQuantized):
        return absmax
    codes = absmax.codes
    levels = _beside(codes, dynamic_levels() if levels is None else levels)
    return kernels_for(codes).decode_constants(codes, absmax.nested_absmax, absmax.offset, levels)


def as_arrays(constants: DoubleQuantized | Values) -> DoubleQuantized | Array:
    """Return constants, doubly quantized or not, as arrays."""
    if isinstance(constants, DoubleQuantized):
        codes, nested = as_array(constants.codes), as_array(constants.nested_absmax)
        return DoubleQuantized(codes, nested, constants.offset)
    return as_array(constants)


def squared_errors(squares: float, moments: Array, absmax: Array) -> float:
    """Return Σ (w - q)² over the weights of M blocks; never negative, despite rounding.

    Args:
        squares: Σ w² over these weights.
        moments: (M, 2), contiguous: the other two moments of each block, see ``Blockwise``.
        absmax: (M,) float32, the final constants of the blocks.
    """
    return max(0.0, squares + float(_loops.sum_errors(moments, absmax)))


def check_block_size(block_size: int) -> None:
    """Raise an error for a block size that readers of the format do not accept.

    Raises:
        UsageError: not a power of two from 32 to 4096.
    """
    if block_size < 32 or block_size > 4096 or block_size & (block_size - 1):
        raise UsageError(
            f"block_size: must be a power of two from 32 to 4096, found {block_size}", hint="64 is the default"
        )


def _beside(values: Values, table: Values) -> Any:
    """Return a table as an array if the values are one, else as a tensor on their device."""
    return as_array(table) if isinstance(values, np.ndarray) else as_tensor(table).to(values.device)
