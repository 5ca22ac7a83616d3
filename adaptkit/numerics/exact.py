"""The canonical change of a weight, its rounded addition and the exact undo, in blocks of rows so that callers stream.

    merged = round(gain · W + Δ)        in float64, rounded once to the dtype of W; the gain is 1 unless one is given

The residual holds what rounding loses: the distance between the original and a guess, only for the weights that the
merged value does not determine. ``kernels.reference`` defines it, and ``residual`` how it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adaptkit.errors import NonFiniteError
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.kernels import cpu
from adaptkit.numerics.kernels._cpu_factors import ROWS, PackedFactors
from adaptkit.numerics.kernels._reference_exact import RowsMerged
from adaptkit.numerics.lora import LowRank


def prepare(terms: Sequence[LowRank]) -> PackedFactors:
    """Prepare at least one low-rank change, in the order of adding; once per weight, not once per block of rows."""
    return cpu.prepare(*_side_by_side(terms))


def delta(terms: Sequence[LowRank], rows: slice = slice(None)) -> Array:
    """Return the given rows of the canonical Σ scaling · B A of at least one term, (rows, in) float64.

    The bits are the same on every machine; see ``kernels.reference.low_rank_delta``.
    """
    return cpu.low_rank_delta(*_side_by_side(terms, rows))


def merge_rows(weight: Array, prepared: PackedFactors, start_row: int, with_undo: bool) -> RowsMerged:
    """Add low-rank changes to some rows of a weight: summed in float64, rounded once.

    Args:
        weight: (rows, in) bfloat16, float16 or float32, finite.
        prepared: the changes.
        start_row: index of the first row in the whole weight.
        with_undo: whether to compute the residual, too.

    Raises:
        NonFiniteError: the weight is not finite, or the sum overflows its dtype.
    """
    _require_rows(prepared, weight, start_row)
    found = cpu.merge_rows(weight, prepared, start_row, with_undo)
    if not found.finite:
        raise _not_finite_error(weight)
    return found


def unmerge_rows(merged: Array, prepared: PackedFactors, start_row: int, residual: Array) -> Array:
    """Restore the rows that ``merge_rows`` was given, to the bit, from what it returned and the same changes.

    Raises:
        ValueError: the residual's length does not match this merge.
    """
    _require_rows(prepared, merged, start_row)
    return _restored(*cpu.unmerge_rows(merged, prepared, start_row, residual), residual)


def merge_affine(weight: Array, change: Array, gain: Array | None, with_undo: bool) -> RowsMerged:
    """Scale rows of a weight and add a change.

    gain · W is rounded to float64, the sum is rounded to float64, and then once to the weight's dtype. The change whose
    squares are summed is (gain - 1) · W + Δ.

    Args:
        weight: (rows, in) bfloat16, float16 or float32, finite.
        change: (rows, in) float64.
        gain: float64, finite, two-dimensional and broadcastable to (rows, in), such as (rows, 1); None for 1.
        with_undo: whether to compute the residual, too.

    Raises:
        NonFiniteError: the weight is not finite, or the sum overflows its dtype.
    """
    merged = cpu.add_rounded(weight, change, gain)
    if not all_finite(merged):
        raise _not_finite_error(weight)
    residual = cpu.undo_residual(weight, merged, change, gain) if with_undo else np.empty(0, np.int64)
    whole = change if gain is None else change + (gain - 1) * weight.astype(np.float64)
    return RowsMerged(merged, residual, True, *cpu.addition_sums(weight, merged, whole))


def unmerge_affine(merged: Array, change: Array, gain: Array | None, residual: Array) -> Array:
    """Restore the rows that ``merge_affine`` was given, to the bit, from what it returned and the same change and gain.

    Raises:
        ValueError: the residual's length does not match this merge.
    """
    return _restored(*cpu.undo(merged, change, residual, gain), residual)


def _require_rows(factors: PackedFactors, weight: Array, start: int) -> None:
    """Raise ``ValueError`` for rows that are not of a weight that the changes fit: kernels check no index."""
    height, columns = len(factors.b) - ROWS, factors.columns
    if weight.shape[1] != columns or not 0 <= start <= start + len(weight) <= height:
        raise ValueError(f"rows of shape {weight.shape} from row {start} on are outside {(height, columns)}")


def _side_by_side(terms: Sequence[LowRank], rows: slice = slice(None)) -> tuple[Array, Array, list[int], list[float]]:
    """Return A (Σ ranks, in) and the given rows of B (rows, Σ ranks) of all terms in float32, ranks and scalings."""
    lora_a = np.concatenate([term.a for term in terms], dtype=np.float32)
    lora_b = np.concatenate([term.b[rows] for term in terms], axis=1, dtype=np.float32)
    return lora_a, lora_b, [term.rank for term in terms], [term.scaling for term in terms]


def _restored(weight: Array, used: int, residual: Array) -> Array:
    if used != residual.size:
        raise ValueError(f"{used} weights are ambiguous, but it holds {residual.size}")
    return weight


def _not_finite_error(weight: Array) -> NonFiniteError:
    if not all_finite(weight):
        return NonFiniteError("the weight holds NaN or infinity", hint="download the base again")
    return NonFiniteError(
        "the merged weight overflows",
        hint="check that this is the right base, and that --weight and the adapter's lora_alpha are right",
    )
