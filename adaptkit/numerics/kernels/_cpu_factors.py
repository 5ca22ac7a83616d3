"""Low-rank factors as the compiled loops want them, and their product B A.

The columns of A are cut into tiles that stay near the processor, each rank of a tile in one piece.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptkit.numerics.kernels._cpu_memory import jit
from adaptkit.numerics.kernels._cpu_product import ROWS, multiply

TILE = 768
"""Columns of a tile."""

_UNIT = 2.0**-24
"""The most by which one float32 operation is off, relative to its result."""

_HOPELESS = 3e38
"""An error so large that nothing can be told, and float32 still holds it."""

_ABOVE = np.float32(1 + 2.0**-22)
"""Times this a float32 is larger than what was rounded to it."""


@dataclass(frozen=True)
class Factors:
    """Low-rank changes of one weight; all arrays are numpy's.

    Attributes:
        a: (tiles, K, TILE) float32, K being the sum of the ranks; zeros fill up the last tile.
        b: (out + ROWS, K) float32, the last rows zero.
        ranks: (adapters,) int64.
        scales: (adapters,) float64.
        columns: in.
    """

    a: Any
    b: Any
    ranks: Any
    scales: Any
    columns: int

    @cached_property
    def gram(self) -> Any:
        """(K, K) float64, the inner products of the rows of A times their scales."""
        with np.errstate(over="ignore", invalid="ignore"):  # such a change overflows, which is found elsewhere
            weighted = self.a.transpose(1, 0, 2).reshape(self._scale.size, -1) * self._scale[:, None]
            return weighted @ weighted.T

    def scaled(self, start: int, count: int) -> tuple[Any, Any]:
        """Some rows of B times the scales in float32, whose product with A is nearly the change; and how nearly.

        Every addition is off by at most a unit relative to the partial sum, which is at most the product of the norms
        of the factors so far; so are every product and the rounding of scale · b. Where numbers are so small that they
        lose digits, or are taken for zero, each is off by 2^-126 more. The float64 sum has an error too, which the
        hundredth on top covers.

        Returns:
            (count + ROWS, K) float32, of which the last rows are there to be multiplied, not to be used; and (count,)
            float32, the most by which their product with A, summed rank by rank, differs from the canonical change.
        """
        rounded = np.empty((count + ROWS, self._scale.size), np.float32)
        errors = np.empty(count, np.float32)
        floor = 2.0**-126 * (self._largest + 2 * self._scale.size + 4)
        _scale_rows(self.b, self._scale, self._norms, start, floor, rounded, errors)
        return rounded, errors

    @cached_property
    def _norms(self) -> Any:
        """(K,), the greatest norm that a column of A has in its first ranks."""
        return np.sqrt(np.square(self.a, dtype=np.float64).cumsum(axis=1).max(axis=(0, 2)))

    @cached_property
    def _largest(self) -> float:
        """Σ over the ranks of the largest magnitude in that row of A."""
        return float(np.abs(self.a).max(axis=(0, 2)).sum(dtype=np.float64))

    @cached_property
    def _scale(self) -> Any:
        return np.repeat(self.scales, self.ranks)


def prepare(lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Factors:
    """See ``reference.prepare``."""
    return Factors(
        a=_tiles(lora_a.float()).numpy(),
        b=pad(lora_b.float(), (0, 0, 0, ROWS)).numpy(),
        ranks=np.array(ranks, np.int64),
        scales=np.array(scales, np.float64),
        columns=lora_a.shape[1],
    )


def _tiles(lora_a: Tensor) -> Tensor:
    ranks, columns = lora_a.shape
    count = max(1, -(-columns // TILE))
    return pad(lora_a, (0, count * TILE - columns)).view(ranks, count, TILE).transpose(0, 1).contiguous()


@jit
def _scale_rows(b, scale, norms, start, floor, rounded, errors):
    for row in range(rounded.shape[0]):
        squares, relative, norm = 0.0, 0.0, 0.0
        for k in range(scale.size):
            factor = np.float64(b[start + row, k]) * scale[k]
            rounded[row, k] = np.float32(factor)
            squares += factor * factor
            norm = np.sqrt(squares)
            relative += norm * norms[k]
        if row < errors.size:
            bound = 1.01 * _UNIT * (relative + 3 * norm * norms[-1]) + floor
            errors[row] = np.float32(min(bound, _HOPELESS)) * _ABOVE


@jit
def _add_scaled(inner, scale, count, delta, row, left, keep):
    """Add one adapter's part of a tile to the change, which is 0 before the first."""
    for i in range(min(ROWS, delta.shape[0] - row)):
        if keep:
            for j in range(count):
                delta[row + i, left + j] += inner[i, j] * scale
        else:
            for j in range(count):
                delta[row + i, left + j] = 0.0 + inner[i, j] * scale


@jit
def _low_rank_delta(a, b, ranks, scales, start, delta):
    inner = np.empty((ROWS, a.shape[2]), np.float64)
    for row in range(0, delta.shape[0], ROWS):
        for tile in range(a.shape[0]):
            left = tile * a.shape[2]
            count = min(a.shape[2], delta.shape[1] - left)
            first = 0
            for adapter in range(ranks.size):
                stop = first + ranks[adapter]
                multiply(a, b, start + row, tile, first, stop, count, inner)
                _add_scaled(inner, scales[adapter], count, delta, row, left, adapter > 0)
                first = stop


# A product of two float32 is exact in float64, so fusing it with the addition changes no bit. It may not be fused with
# the scale; flags are a function's own.
@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
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
    delta = torch.empty(count, factors.columns, dtype=torch.float64)
    _low_rank_delta(factors.a, factors.b, factors.ranks, factors.scales, start, delta.numpy())
    return delta


def low_rank_delta(lora_a: Tensor, lora_b: Tensor, ranks: list[int], scales: list[float]) -> Tensor:
    """See ``reference.low_rank_delta``."""
    return delta_rows(prepare(lora_a, lora_b, ranks, scales), 0, lora_b.shape[0])
