"""Low-rank factors as the compiled loops want them, and their product B A.

The columns of A are cut into tiles that stay near the processor, each rank of a tile in one piece; ranks are padded to
a multiple of four with zeros, whose products change nothing. The loops take four rows of B and four ranks at a time,
so that the sixteen factors stay in registers; the ranks keep their order.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor
from torch.nn.functional import pad

from adaptkit.numerics.kernels._cpu_memory import INLINED, inlined, jit

BLOCK = 4
"""Rows, and ranks, that are multiplied at a time."""

TILE = 512
"""Columns of a tile."""

_UNIT = 2.0**-24
"""The most by which one float32 operation is off, relative to its result."""


@dataclass(frozen=True)
class Factors:
    """Low-rank changes of one weight; all arrays are numpy's.

    Attributes:
        a: (tiles, K, TILE) float32, K being the sum of the padded ranks.
        b: (out + BLOCK, K) float32, the last rows zero.
        ranks: (adapters,) int64, padded.
        scales: (adapters,) float64.
        columns: in.
    """

    a: Any
    b: Any
    ranks: Any
    scales: Any
    columns: int

    @cached_property
    def scaled(self) -> Any:
        """B times the scales, rounded to float32."""
        return (self.b * self._scale).astype(np.float32)

    @cached_property
    def gram(self) -> Any:
        """(K, K) float64, the inner products of the rows of A times their scales."""
        weighted = self.a.transpose(1, 0, 2).reshape(self._scale.size, -1) * self._scale[:, None]
        return weighted @ weighted.T

    @cached_property
    def errors(self) -> Any:
        """(out,) float32: how far the product of ``scaled`` and A, summed in float32, may be from the canonical change.

        Every addition is off by at most a unit relative to the partial sum, which is at most the product of the norms
        of the factors so far; so are every product and the rounding of scale · b. Where numbers are so small that they
        lose digits, or are taken for zero, each is off by 2^-126 more. The float64 sum has an error too, which the
        hundredth on top covers.
        """
        terms, largest = self._scale.size, np.abs(self.a).max(axis=(0, 2)).astype(np.float64)
        norms_a = np.sqrt(np.square(self.a, dtype=np.float64).cumsum(axis=1).max(axis=(0, 2)))
        norms_b = np.sqrt(np.square(self.b * self._scale).cumsum(axis=1))
        relative = norms_b @ norms_a + 3 * norms_b[:, -1] * norms_a[-1]
        bound = 1.01 * _UNIT * relative + 2.0**-126 * (largest.sum() + terms + 4)
        return np.nextafter(bound.astype(np.float32), np.float32(np.inf))

    @property
    def _scale(self) -> Any:
        return np.repeat(self.scales, self.ranks)


def prepare(lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Factors:
    """See ``reference.prepare``."""
    padding = [-rank % BLOCK for rank in ranks]
    parts = zip(lora_a.float().split(ranks), lora_b.float().split(ranks, dim=1), padding, strict=True)
    a, b = zip(*((pad(x, (0, 0, 0, n)), pad(y, (0, n))) for x, y, n in parts), strict=True)
    return Factors(
        a=_tiles(torch.cat(a)).numpy(),
        b=pad(torch.cat(b, dim=1), (0, 0, 0, BLOCK)).numpy(),
        ranks=np.array([rank + n for rank, n in zip(ranks, padding, strict=True)], np.int64),
        scales=np.array(scales, np.float64),
        columns=lora_a.shape[1],
    )


def _tiles(lora_a: Tensor) -> Tensor:
    ranks, columns = lora_a.shape
    count = max(1, -(-columns // TILE))
    return pad(lora_a, (0, count * TILE - columns)).view(ranks, count, TILE).transpose(0, 1).contiguous()


def _as(array, number):
    """A number as the type of an array's elements."""
    raise NotImplementedError


@overload(_as, jit_options=INLINED)
def _as_type(array, number):
    if array.dtype == types.float64:
        return lambda array, number: np.float64(number)
    return lambda array, number: np.float32(number)


# A product of two float32 is exact in float64, so fusing it with the addition changes no bit there. (In float32 it
# does, but there only a bound of the error is wanted.) Nothing else may be fused: flags are a function's own.
_fused = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})


@numba.njit(nogil=True, cache=True, fastmath={"contract"}, **INLINED)
def _four(total, b, a):
    return (((total + b[0] * a[0]) + b[1] * a[1]) + b[2] * a[2]) + b[3] * a[3]


@inlined
def _four_factors(out, b, row, k):
    return _as(out, b[row, k]), _as(out, b[row, k + 1]), _as(out, b[row, k + 2]), _as(out, b[row, k + 3])


@inlined
def _four_ranks(out, a, tile, k, j):
    first, second = _as(out, a[tile, k, j]), _as(out, a[tile, k + 1, j])
    return first, second, _as(out, a[tile, k + 2, j]), _as(out, a[tile, k + 3, j])


@inlined
def _multiply_four(a, b, row, tile, k, count, out, keep):
    """Put the products of four rows of B with four ranks of a tile of A into ``out``, or add them to what it holds."""
    b0, b1 = _four_factors(out, b, row, k), _four_factors(out, b, row + 1, k)
    b2, b3 = _four_factors(out, b, row + 2, k), _four_factors(out, b, row + 3, k)
    if keep:
        for j in range(count):
            x = _four_ranks(out, a, tile, k, j)
            out[0, j], out[1, j] = _four(out[0, j], b0, x), _four(out[1, j], b1, x)
            out[2, j], out[3, j] = _four(out[2, j], b2, x), _four(out[3, j], b3, x)
    else:
        for j in range(count):
            x, zero = _four_ranks(out, a, tile, k, j), _as(out, 0)
            out[0, j], out[1, j] = _four(zero, b0, x), _four(zero, b1, x)
            out[2, j], out[3, j] = _four(zero, b2, x), _four(zero, b3, x)


@jit
def multiply(a, b, row, tile, first, stop, count, out):
    """Put B A for four rows and a tile's first ``count`` columns into ``out``, over the ranks from first to stop."""
    for k in range(first, stop, BLOCK):
        _multiply_four(a, b, row, tile, k, count, out, k > first)


@jit
def _add_scaled(inner, scale, count, delta, row, left):
    for i in range(min(BLOCK, delta.shape[0] - row)):
        for j in range(count):
            delta[row + i, left + j] += inner[i, j] * scale


@jit
def _low_rank_delta(a, b, ranks, scales, start, delta):
    inner = np.empty((BLOCK, a.shape[2]), np.float64)
    for row in range(0, delta.shape[0], BLOCK):
        for tile in range(a.shape[0]):
            left = tile * a.shape[2]
            count = min(a.shape[2], delta.shape[1] - left)
            first = 0
            for adapter in range(ranks.size):
                stop = first + ranks[adapter]
                multiply(a, b, start + row, tile, first, stop, count, inner)
                _add_scaled(inner, scales[adapter], count, delta, row, left)
                first = stop


@_fused
def _inner_at(a, b, row, tile, column, first, stop):
    total = 0.0
    for k in range(first, stop):
        total += np.float64(b[row, k]) * np.float64(a[tile, k, column])
    return total


@jit
def delta_at(factors, row, tile, column):
    """One element of the canonical change, from the first four arrays of ``Factors``."""
    a, b, ranks, scales = factors
    total, first = 0.0, 0
    for adapter in range(ranks.size):
        stop = first + ranks[adapter]
        total += _inner_at(a, b, row, tile, column, first, stop) * scales[adapter]
        first = stop
    return total


def delta_rows(factors: Factors, start: int, count: int) -> Tensor:
    """Rows of the canonical change, (count, in) float64."""
    delta = torch.zeros(count, factors.columns, dtype=torch.float64)
    _low_rank_delta(factors.a, factors.b, factors.ranks, factors.scales, start, delta.numpy())
    return delta


def low_rank_delta(lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Tensor:
    """See ``reference.low_rank_delta``."""
    return delta_rows(prepare(lora_a, lora_b, ranks, scales), 0, lora_b.shape[0])
