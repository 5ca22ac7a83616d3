"""Low-rank factors in the layout of the compiled loops, and their product B A.

The columns of A are cut into tiles that fit the cache; within a tile each row of A is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels._jit import compiled, jit

TILE = 768
"""Columns per tile."""

ROWS = 4
"""Rows whose product is computed together, while a tile of A is in the cache."""

_UNIT = 2.0**-24
"""Maximum relative error of one float32 operation."""

_MAX_ERROR = 3e38
"""Cap of an error bound: too large for anything to be decided, but finite in float32."""

_ABOVE = np.float32(1 + 2.0**-22)
"""Multiplying a float32 by it gives more than the number that was rounded to that float32."""


@dataclass(frozen=True)
class PackedFactors:
    """Low-rank changes of one weight of shape (out, in), as numpy arrays.

    Attributes:
        a: (tiles, K, TILE) float32, K being the sum of the ranks; the last tile is padded with zeros.
        b: (out + ROWS, K) float64, the last ROWS rows zero.
        ranks: (adapters,) int64.
        scales: (adapters,) float64.
        columns: columns of the weight (in).
    """

    a: Any
    b: Any
    ranks: Any
    scales: Any
    columns: int

    @cached_property
    def gram(self) -> Any:
        """(K, K) float64, the inner products of the rows of A, each multiplied by its scale."""
        rows = self.a.transpose(1, 0, 2).reshape(self._scale.size, -1) * self._scale[:, None]
        with np.errstate(all="ignore"):  # infinite if the change overflows, detected elsewhere
            return rows @ rows.T

    def scaled(self, start: int, count: int) -> tuple[Any, Any]:
        """Return rows of B times the scales in float32, and a bound on the error of their product with A.

        Each addition has an error of at most ``_UNIT`` times the partial sum, which is at most the product of the norms
        of the factors; the same holds for each product and for rounding scale · b. Where numbers are subnormal or
        flushed to zero, each operation adds at most 2^-126. One percent more covers the errors of the bound itself.

        Returns:
            (count + ROWS, K) float32, whose last ROWS rows are padding for ``multiply``; and (count,) float32,
            upper bounds on the difference between their product with A, summed rank by rank, and the canonical change.
        """
        norm, largest = self._bounds
        floor = 2.0**-126 * (largest + 2 * self._scale.size + 4)
        with np.errstate(all="ignore"):
            rows = self.b[start : start + count + ROWS] * self._scale
            norms = np.sqrt(np.square(rows[:count]).sum(axis=1))
            errors = 1.01 * _UNIT * (self._scale.size + 3) * norm * norms + floor
            return rows.astype(np.float32), np.fmin(errors, _MAX_ERROR).astype(np.float32) * _ABOVE

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        """The greatest norm of a column of A, and the sum of its rows' largest magnitudes."""
        sizes = np.abs(self.a)
        norms = np.sqrt(np.square(sizes, dtype=np.float64).sum(axis=1))
        return float(norms.max()), float(sizes.max(axis=(0, 2)).sum(dtype=np.float64))

    @cached_property
    def _scale(self) -> Any:
        return np.repeat(self.scales, self.ranks)


def prepare(lora_a: Array, lora_b: Array, ranks: list[int], scales: list[float]) -> PackedFactors:
    """See ``reference.prepare``."""
    padded = np.zeros((lora_b.shape[0] + ROWS, lora_b.shape[1]), np.float64)
    padded[: lora_b.shape[0]] = lora_b
    return PackedFactors(
        _tiles(lora_a), padded, np.array(ranks, np.int64), np.array(scales, np.float64), lora_a.shape[1]
    )


def _tiles(a: Array) -> Any:
    ranks, columns = a.shape
    count = max(1, -(-columns // TILE))
    tiles = np.zeros((count, ranks, TILE), np.float32)
    for tile in range(count):
        piece = a[:, tile * TILE : (tile + 1) * TILE]
        tiles[tile, :, : piece.shape[1]] = piece
    return tiles


# A product of two float32 is exact in float64, so fusing it with the addition changes no bit. Multiplying by the scale
# must not be fused, so it is in the caller: fast-math flags apply to one function.
@compiled(fastmath={"contract"})
def multiply(a, b, row, tile, first, stop, count, out):
    """Write B A to ``out``, for ``ROWS`` rows from ``row`` on and the first ``count`` columns of a tile.

    ``a`` is (tiles, K, TILE) float32; ``b`` is (rows, K), of the type of ``out``, (ROWS, TILE) float32 or float64. The
    sums run over the ranks from ``first`` to ``stop`` - 1, ascending.
    """
    rows = a[tile]
    for i in range(ROWS):
        total, factors, k = out[i, :count], b[row + i], first
        total[:] = 0
        while k + 4 <= stop:  # four at a time: the sums are in memory
            a0, a1, a2, a3 = rows[k, :count], rows[k + 1, :count], rows[k + 2, :count], rows[k + 3, :count]
            b0, b1, b2, b3 = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
            for j in range(count):
                total[j] = (((total[j] + b0 * a0[j]) + b1 * a1[j]) + b2 * a2[j]) + b3 * a3[j]
            k += 4
        while k < stop:
            a0, b0 = rows[k, :count], factors[k]
            for j in range(count):
                total[j] += b0 * a0[j]
            k += 1


@jit
def _add_scaled(inner, scale, count, delta, row, left, keep):
    """Add one adapter's part of a tile to the change, or write it if not ``keep`` (for the first adapter)."""
    for i in range(min(ROWS, delta.shape[0] - row)):
        if keep:
            for j in range(count):
                delta[row + i, left + j] += inner[i, j] * scale
        else:
            for j in range(count):
                delta[row + i, left + j] = 0.0 + inner[i, j] * scale


@jit
def _low_rank_delta(a, b, ranks, scales, start, inner, delta):
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


@compiled(fastmath={"contract"})  # as in ``multiply``
def _inner_at(a, b, row, tile, column, first, stop):
    total = 0.0
    for k in range(first, stop):
        total += b[row, k] * np.float64(a[tile, k, column])
    return total


@jit
def delta_at(factors, row, tile, column):
    """Return one element of the canonical change, from the first four fields of ``PackedFactors``."""
    a, b, ranks, scales = factors
    total, first = 0.0, 0
    for adapter in range(ranks.size):
        stop = first + ranks[adapter]
        total += _inner_at(a, b, row, tile, column, first, stop) * scales[adapter]
        first = stop
    return total


def delta_rows(factors: PackedFactors, start: int, count: int) -> Array:
    """Return rows of the canonical change, (count, in) float64."""
    delta: Array = np.empty((count, factors.columns), np.float64)
    inner = np.empty((ROWS, factors.a.shape[2]))
    _low_rank_delta(factors.a, factors.b, factors.ranks, factors.scales, start, inner, delta)
    return delta


def low_rank_delta(lora_a: Array, lora_b: Array, ranks: list[int], scales: list[float]) -> Array:
    """See ``reference.low_rank_delta``."""
    return delta_rows(prepare(lora_a, lora_b, ranks, scales), 0, lora_b.shape[0])
