"""Merging and unmerging of rows in one pass, compiled, without a float64 matrix of the whole change.

A tile of the change is computed in float32 for four rows at a time and added by ``_cpu_filter``; elements that are
doubtful there are recomputed as ``reference`` defines them. For float32 weights, where float32 arithmetic can decide
nothing, the change of a few rows at a time is computed in float64.
"""

from __future__ import annotations

import math
from typing import Any

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.kernels import _cpu_exact
from adaptkit.numerics.kernels._cpu_double import at_ordinal, is_finite, ordinal
from adaptkit.numerics.kernels._cpu_exact import candidate, result
from adaptkit.numerics.kernels._cpu_factors import ROWS, TILE, PackedFactors, delta_at, delta_rows, multiply
from adaptkit.numerics.kernels._cpu_filter import (
    UNKNOWN,
    find_candidates,
    find_nonzero,
    round_row,
    square_row,
    trusted_range,
)
from adaptkit.numerics.kernels._cpu_float import any_value, float_bits
from adaptkit.numerics.kernels._jit import jit
from adaptkit.numerics.kernels._reference_exact import RowsMerged, check_length

_Figures = tuple[int, float, float, float]
"""The results of ``reference.addition_sums``."""

_PANEL_ELEMENTS = 1 << 18
"""Number of elements whose change is held in float64 at a time."""


@jit
def _recompute(weight, row, left, factors, start, tile, delta, i, found, count, out, sums):
    """Recompute the doubtful elements of a piece of a row exactly; return whether all of them are finite."""
    finite = True
    for n in range(count):
        j = found[n]
        before = weight[row, left + j]
        bits = result(weight, before, delta_at(factors, start + row, tile, j), 1.0)
        effect = np.float64(any_value(out, bits)) - np.float64(any_value(weight, before))
        sums[0] += effect != 0
        sums[2] += effect * np.float64(delta[i, j])
        finite &= is_finite(out, bits)
        out[row, left + j] = bits
    return finite


@jit
def _decide_guesses(merged, row, left, factors, start, tile, found, count, guess, guess_row, guess_left, states):
    """Decide the guesses that float32 could not; keep ambiguous ones in ``found``, return their number."""
    total = 0
    for n in range(count):
        j = found[n]
        ambiguous = True
        if states[j] == UNKNOWN:
            change = delta_at(factors, start + row, tile, j)
            bits, ambiguous = candidate(merged, merged[row, left + j], change, 1.0)
            guess[guess_row, guess_left + j] = bits
        found[total] = j
        total += ambiguous
    return total


@jit
def _merge_rows(weight, factors, scaled, errors, start, with_undo, room, out, guess, residual, sums):
    """Merge a block of rows; return the length of the residual, and whether the result is finite."""
    a, columns = factors[0], weight.shape[1]
    delta, marks, eights, words, found, pending, counts = room
    finite, length = True, 0
    for top in range(0, weight.shape[0], ROWS):
        height = min(ROWS, weight.shape[0] - top)
        for tile in range(a.shape[0]):
            left = tile * TILE
            count = min(TILE, columns - left)
            multiply(a, scaled, top, tile, 0, a.shape[1], count, delta)
            for i in range(height):
                row, error = top + i, errors[top + i]
                least, span = trusted_range(weight, error)
                moved, overlap, doubts = round_row(weight, row, left, count, delta, i, error, least, span, out, marks)
                sums[0] += moved
                sums[1] += square_row(weight, row, left, count)
                sums[2] += overlap
                if doubts:
                    marked = find_nonzero(marks, eights, count, words, found)
                    finite &= _recompute(weight, row, left, factors, start, tile, delta, i, found, marked, out, sums)
                if with_undo:
                    find_candidates(out, row, left, count, delta, i, error, least, span, guess, 0, 0, marks)
                    marked = find_nonzero(marks, eights, count, words, found)
                    marked = _decide_guesses(out, row, left, factors, start, tile, found, marked, guess, 0, 0, marks)
                    for n in range(marked):
                        above = ordinal(weight, weight[row, left + found[n]]) - ordinal(guess, guess[0, found[n]])
                        pending[i, counts[i] + n] = above
                    counts[i] += marked
        for i in range(height):
            for n in range(counts[i]):
                residual[length + n] = pending[i, n]
            length += counts[i]
            counts[i] = 0
    return length, finite


@jit
def _unmerge_rows(merged, factors, scaled, errors, start, residual, room, out):
    """Restore a block of rows; return how much of the residual is needed, which may be more than it has."""
    a, columns = factors[0], merged.shape[1]
    delta, marks, eights, words, found, pending, counts = room
    used = 0
    for top in range(0, merged.shape[0], ROWS):
        height = min(ROWS, merged.shape[0] - top)
        for tile in range(a.shape[0]):
            left = tile * TILE
            count = min(TILE, columns - left)
            multiply(a, scaled, top, tile, 0, a.shape[1], count, delta)
            for i in range(height):
                row, error = top + i, errors[top + i]
                least, span = trusted_range(merged, error)
                find_candidates(merged, row, left, count, delta, i, error, least, span, out, row, left, marks)
                marked = find_nonzero(marks, eights, count, words, found)
                marked = _decide_guesses(merged, row, left, factors, start, tile, found, marked, out, row, left, marks)
                for n in range(marked):
                    pending[i, counts[i] + n] = left + found[n]
                counts[i] += marked
        for i in range(height):
            for n in range(min(counts[i], residual.size - used)):
                place = ordinal(out, out[top + i, pending[i, n]]) + residual[used + n]
                out[top + i, pending[i, n]] = at_ordinal(out, place)
            used += counts[i]
            counts[i] = 0
    return used


def _room(columns: int) -> tuple[Any, ...]:
    """Make scratch arrays for the loops.

    Returns:
        The change of four rows of a tile; marks for one of its rows, and the same memory as 64-bit words; indices of
        words, and of marks; for each of the four rows its residuals (merge) or the columns that need one (unmerge), and
        their number.
    """
    marks = np.zeros(TILE, np.uint8)
    places = np.empty(TILE // 8 + 1, np.int64), np.empty(TILE + 1, np.int64)
    rest = np.empty((ROWS, columns), np.int64), np.zeros(ROWS, np.int64)
    return np.empty((ROWS, TILE), np.float32), marks, marks.view(np.uint64), *places, *rest


def merge_rows(weight: Array, factors: PackedFactors, start: int, with_undo: bool) -> RowsMerged:
    """See ``reference.merge_rows``."""
    merge = _merge_by_panels if weight.dtype == np.float32 else _merge_by_tiles
    return merge(np.ascontiguousarray(weight), factors, start, with_undo)


def _merge_by_tiles(weight: Array, factors: PackedFactors, start: int, with_undo: bool) -> RowsMerged:
    out = np.empty(weight.shape, weight.dtype)
    residual, sums = np.empty(weight.size if with_undo else 0, np.int64), np.zeros(3)
    arrays = (factors.a, factors.b, factors.ranks, factors.scales), *factors.scaled(start, len(weight))
    scratch = _room(weight.shape[1]), float_bits(out), float_bits(np.empty((1, TILE), weight.dtype))
    length, finite = _merge_rows(float_bits(weight), *arrays, start, with_undo, *scratch, residual, sums)
    moved, squared_weight, overlap = sums.tolist()
    rows = factors.b[start : start + len(weight)]
    with np.errstate(all="ignore"):  # infinite if the change overflows
        squared_delta = float((rows @ factors.gram * rows).sum())
        orthogonal = float((np.square(rows) @ factors.gram.diagonal()).sum())  # Σ Δ² if the rank-1 parts were
    if not _figures_hold(squared_delta, orthogonal, overlap, weight.size):
        figures = _figures(weight, out, factors, start)
    else:
        figures = int(moved), squared_delta, squared_weight, overlap
    return RowsMerged(out, residual[:length].copy(), bool(finite), *figures)


def _figures_hold(squared_delta: float, orthogonal: float, overlap: float, count: int) -> bool:
    """Return whether the terms of Δ hardly cancel, and no square underflowed or overflowed float32."""
    within = 2.0**-80 * count < squared_delta < 2.0**100
    return within and squared_delta > 0.1 * orthogonal and math.isfinite(overlap)


def _panels(rows: int, columns: int) -> list[slice]:
    step = max(1, _PANEL_ELEMENTS // max(1, columns))
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def _figures(weight: Array, merged: Array, factors: PackedFactors, start: int) -> _Figures:
    """Compute the figures from the canonical change itself."""
    total = (0, 0.0, 0.0, 0.0)
    for rows in _panels(*weight.shape):
        delta = delta_rows(factors, start + rows.start, rows.stop - rows.start)
        total = _added(total, _cpu_exact.addition_sums(weight[rows], merged[rows], delta))
    return total


def _added(first: _Figures, second: _Figures) -> _Figures:
    return first[0] + second[0], first[1] + second[1], first[2] + second[2], first[3] + second[3]


def _merge_by_panels(weight: Array, factors: PackedFactors, start: int, with_undo: bool) -> RowsMerged:
    merged, residuals = np.empty(weight.shape, weight.dtype), [np.empty(0, np.int64)]
    figures = (0, 0.0, 0.0, 0.0)
    for rows in _panels(*weight.shape):
        before, delta = weight[rows], delta_rows(factors, start + rows.start, rows.stop - rows.start)
        after = merged[rows] = _cpu_exact.add_rounded(before, delta)
        figures = _added(figures, _cpu_exact.addition_sums(before, after, delta))
        if with_undo:
            residuals.append(_cpu_exact.undo_residual(before, after, delta))
    finite = math.isfinite(figures[3])  # it is not finite exactly if some effect is not
    return RowsMerged(merged, np.concatenate(residuals), finite, *figures)


def unmerge_rows(merged: Array, factors: PackedFactors, start: int, residual: Array) -> tuple[Array, int]:
    """See ``reference.unmerge_rows``."""
    unmerge = _unmerge_by_panels if merged.dtype == np.float32 else _unmerge_by_tiles
    return unmerge(np.ascontiguousarray(merged), factors, start, np.ascontiguousarray(residual))


def _unmerge_by_tiles(merged: Array, factors: PackedFactors, start: int, residual: Array) -> tuple[Array, int]:
    out = np.empty(merged.shape, merged.dtype)
    arrays = (factors.a, factors.b, factors.ranks, factors.scales), *factors.scaled(start, len(merged))
    used = _unmerge_rows(float_bits(merged), *arrays, start, residual, _room(merged.shape[1]), float_bits(out))
    check_length(used, residual.size)
    return out, used


def _unmerge_by_panels(merged: Array, factors: PackedFactors, start: int, residual: Array) -> tuple[Array, int]:
    out, used = np.empty(merged.shape, merged.dtype), 0
    for rows in _panels(*merged.shape):
        delta = delta_rows(factors, start + rows.start, rows.stop - rows.start)
        out[rows], more = _cpu_exact.undo(merged[rows], delta, residual[used:])
        used += more
    return out, used
