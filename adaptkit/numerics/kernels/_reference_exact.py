"""The part of ``reference`` that merges and unmerges: the canonical change, the rounded addition, its inverse.

A merge is round(gain · W + Δ), where W and the result have one type of at most 32 bits and all else is float64: the
product is rounded to float64, then the sum is, and that is rounded once to the type of W. The gain is 1 unless an
adapter has another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptkit.numerics.dtypes import Array, cast


def int_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the integer type that holds the bits of a weight type."""
    return np.dtype(f"i{dtype.itemsize}")


@dataclass(frozen=True)
class Factors:
    """Low-rank changes of one weight, to be added to it in this order.

    Attributes:
        lora_a: (Σ ranks, in) float32, the adapters' A matrices stacked vertically.
        lora_b: (out, Σ ranks) float32, their B matrices stacked horizontally.
        ranks: rank of each adapter.
        scales: weight · scaling of each adapter.
    """

    lora_a: Array
    lora_b: Array
    ranks: list[int]
    scales: list[float]


@dataclass(frozen=True)
class RowsMerged:
    """The result of ``merge_rows``.

    Attributes:
        weight: (rows, in) of the original weight's type.
        residual: (M,) int64, as from ``undo_residual``; empty if not requested.
        finite: whether all of ``weight`` is finite; if not, the figures below are meaningless.
        moved: number of values that changed.
        squared_delta: Σ Δ².
        squared_weight: Σ W².
        overlap: Σ (merged - W) · Δ, with an error of up to 1e-6 · Σ Δ².
    """

    weight: Array
    residual: Array
    finite: bool
    moved: int
    squared_delta: float
    squared_weight: float
    overlap: float


def low_rank_delta(lora_a: Array, lora_b: Array, ranks: list[int], scales: list[float]) -> Array:
    """Return the canonical change of a weight: Σ over adapters of scale · (B A), the same bits on every machine.

    The inner sum is computed in float64 in ascending order of rank; a product of two float32 is exact there. It is
    scaled, then added to the sum of the adapters before it. No matrix library is used, so the bits depend neither on
    threads nor on the processor.

    Args:
        lora_a: see ``Factors``.
        lora_b: see ``Factors``.
        ranks: see ``Factors``.
        scales: see ``Factors``.

    Returns:
        (out, in) float64.
    """
    a, b = lora_a.astype(np.float64), lora_b.astype(np.float64)
    delta = np.zeros((b.shape[0], a.shape[1]))
    start = 0
    for rank, scale in zip(ranks, scales, strict=True):
        inner = np.zeros_like(delta)
        for k in range(start, start + rank):
            inner += b[:, k, None] * a[None, k, :]
        delta += inner * scale
        start += rank
    return delta


def round_to(exact: Array, dtype: np.dtype[Any]) -> Array:
    """Round float64 once to a narrower float type, to nearest with ties to even.

    ml_dtypes converts through float32 and so rounds twice. Here the float32 step rounds to odd, which keeps enough
    information for the second step to be correct (Boldo and Melquiond, 2008).
    """
    nearest = cast(exact, np.float32)
    if dtype == np.float32:
        return nearest
    bits, wide = nearest.view(np.int32), nearest.astype(np.float64)
    odd = np.where(np.abs(wide) > np.abs(exact), bits - 1, bits + 1).astype(np.int32)
    return cast(np.where((wide != exact) & (bits % 2 == 0), odd, bits).view(np.float32), dtype)


@np.errstate(all="ignore")
def add_rounded(weight: Array, delta: Array, gain: Array | None = None) -> Array:
    """``gain · weight + delta``, computed in float64 and rounded once to the weight's dtype.

    Args:
        weight: (out, in) bfloat16, float16 or float32.
        delta: (out, in) float64.
        gain: float64, finite, two-dimensional, broadcast to (out, in); None for 1.

    Returns:
        (out, in) of the weight's dtype; not finite where the sum overflows.
    """
    exact = weight.astype(np.float64)
    return round_to((exact if gain is None else exact * gain) + delta, weight.dtype)


@np.errstate(all="ignore")
def addition_sums(weight: Array, merged: Array, delta: Array) -> tuple[int, float, float, float]:
    """Return figures of an addition for reports; so, unlike elsewhere, the order of the sums is not fixed.

    Args:
        weight: (out, in), before.
        merged: (out, in), after.
        delta: (out, in) float64.

    Returns:
        The number of values that changed, Σ Δ², Σ W², and Σ (merged - W) · Δ.
    """
    exact = weight.astype(np.float64)
    effect = merged.astype(np.float64) - exact
    return int((effect != 0).sum()), float((delta**2).sum()), float((exact**2).sum()), float((effect * delta).sum())


def ordinal(values: Array) -> Array:
    """Number the floats of a type in order: neighbours differ by one, and -0 comes just before +0.

    Returns:
        int32 of the same shape for 16-bit types, int64 for float32.
    """
    bits = values.view(int_type(values.dtype))
    wide: Array = bits.astype(np.int32 if bits.itemsize == 2 else np.int64)
    top = 1 << (8 * bits.itemsize - 1)
    return np.where(wide >= 0, wide, -(wide + top) - 1)


def from_ordinal(ordinals: Array, dtype: np.dtype[Any]) -> Array:
    """Undo ``ordinal``."""
    ints = int_type(dtype)
    top = 1 << (8 * ints.itemsize - 1)
    return np.where(ordinals >= 0, ordinals, -(ordinals + 1) - top).astype(ints).view(dtype)


@np.errstate(all="ignore")
def _candidate(merged: Array, delta: Array, gain: Array | None) -> tuple[Array, Array]:
    """Return a guess at the original weight, as an ordinal, and where it is certain.

    The guess is (merged - delta) / gain, rounded, or ``merged`` where that is not finite (as for a gain of 0, where
    merged is delta: a replacement is often close to the original). The result of a merge is monotonic in the weight:
    it rises, falls with a negative gain, or is constant with a gain of 0. So the weights with one result are
    neighbours, and the guess is certainly the original if its result is ``merged`` and that of neither neighbour is.
    """
    exact = merged.astype(np.float64) - delta
    near = round_to(exact if gain is None else exact / gain, merged.dtype)
    guess = ordinal(np.where(np.isfinite(near), near, merged))
    certain = np.ones(guess.shape, np.bool_)
    for step, expected in ((0, True), (1, False), (-1, False)):
        again = add_rounded(from_ordinal(guess + step, merged.dtype), delta, gain)
        certain &= (ordinal(again) == ordinal(merged)) == expected
    return guess, certain


def undo_residual(weight: Array, merged: Array, delta: Array, gain: Array | None = None) -> Array:
    """Return what must be stored so that ``undo`` restores ``weight`` bit for bit.

    Args:
        weight: (out, in), the original.
        merged: (out, in), ``add_rounded(weight, delta, gain)``, finite.
        delta: (out, in) float64.
        gain: as for ``add_rounded``.

    Returns:
        (M,) int64: for each of the M weights that ``merged``, ``delta`` and ``gain`` do not determine, in row-major
        order, the ordinal of the original minus that of the guess.
    """
    guess, certain = _candidate(merged, delta, gain)
    return (ordinal(weight) - guess)[~certain].astype(np.int64)


def undo(merged: Array, delta: Array, residual: Array, gain: Array | None = None) -> tuple[Array, int]:
    """Restore the weight that ``add_rounded`` turned into ``merged``.

    Args:
        merged: (out, in).
        delta: (out, in) float64, the same bits as when merging.
        residual: (M,) int64 that begins with the result of ``undo_residual``; more may follow.
        gain: the same bits as when merging.

    Returns:
        The weight, (out, in) of the merged dtype, and how much of the residual was used.

    Raises:
        ValueError: the residual is shorter than this addition requires.
    """
    guess, certain = _candidate(merged, delta, gain)
    used = int((~certain).sum())
    check_length(used, residual.size)
    guess[~certain] += residual[:used].astype(guess.dtype)
    return from_ordinal(guess, merged.dtype), used


def check_length(used: int, length: int) -> None:
    """Raise ``ValueError`` if a residual is too short."""
    if used > length:
        raise ValueError(f"{used} weights are ambiguous, but it holds {length}")


def prepare(lora_a: Array, lora_b: Array, ranks: list[int], scales: list[float]) -> Factors:
    """Convert changes into the form that ``merge_rows`` and ``unmerge_rows`` take; see ``Factors``."""
    return Factors(lora_a, lora_b, ranks, scales)


def _delta_rows(factors: Factors, start: int, count: int) -> Array:
    return low_rank_delta(factors.lora_a, factors.lora_b[start : start + count], factors.ranks, factors.scales)


def merge_rows(weight: Array, factors: Factors, start: int, with_undo: bool) -> RowsMerged:
    """Add prepared changes to some rows of a weight.

    Args:
        weight: (rows, in) bfloat16, float16 or float32.
        factors: from ``prepare`` of the same module.
        start: index of the first row in the whole weight.
        with_undo: whether to compute the residual too.
    """
    delta = _delta_rows(factors, start, weight.shape[0])
    merged = add_rounded(weight, delta)
    residual = undo_residual(weight, merged, delta) if with_undo else np.empty(0, np.int64)
    return RowsMerged(merged, residual, bool(np.isfinite(merged).all()), *addition_sums(weight, merged, delta))


def unmerge_rows(merged: Array, factors: Factors, start: int, residual: Array) -> tuple[Array, int]:
    """Restore the rows that ``merge_rows`` was given; see ``undo`` for the return value and errors.

    Args:
        merged: (rows, in).
        factors: the same changes in the same order, from ``prepare`` of the same module.
        start: index of the first row in the whole weight.
        residual: (M,) int64 that begins with the residual from ``merge_rows``.
    """
    return undo(merged, _delta_rows(factors, start, merged.shape[0]), residual)
