"""Rounded addition to a weight and its exact undo, a few rows at a time so that callers can stream.

    merged = round(gain · W + Δ)        in float64, rounded once to the dtype of W; the gain is 1 unless one is given

The residual holds what rounding loses: the distance between the original and a guess, only for the weights that the
merged value does not determine. ``kernels.reference`` defines it, and ``residual`` how it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptkit.errors import NonFiniteError
from adaptkit.lazy import torch
from adaptkit.numerics.arrays import AnyValues, Values, as_tensor
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.kernels import Kernels, kernels_for
from adaptkit.numerics.kernels._reference_exact import RowsMerged
from adaptkit.numerics.lora import LowRank, side_by_side

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """Low-rank changes of one weight in the kernels' own form; threads may share it.

    Attributes:
        shape: (out, in) of the weight.
        kernels: kernels for the device that holds the changes.
        factors: result of ``kernels.prepare``.
    """

    shape: tuple[int, int]
    kernels: Kernels
    factors: Any


def prepare(terms: Sequence[LowRank]) -> Prepared:
    """Prepare low-rank changes for adding to one weight; call once per weight, not once per block of rows.

    Args:
        terms: at least one, each of shape (out, in), in the order in which they are added.
    """
    lora_a, lora_b = side_by_side(terms)
    ranks, scales = [term.rank for term in terms], [term.scaling for term in terms]
    kernels = kernels_for(lora_a)
    return Prepared(terms[0].shape, kernels, kernels.prepare(lora_a, lora_b, ranks, scales))


def merge_rows(weight: Values, prepared: Prepared, start_row: int, with_undo: bool) -> RowsMerged:
    """Add low-rank changes to some rows of a weight: summed in float64, rounded once.

    Args:
        weight: (rows, in) bfloat16, float16 or float32, finite.
        prepared: the changes.
        start_row: index of the first row in the whole weight.
        with_undo: whether to compute the residual, too.

    Raises:
        NonFiniteError: the weight is not finite, or the sum overflows its dtype.
    """
    _check_rows(weight, prepared, start_row)
    found = prepared.kernels.merge_rows(weight, prepared.factors, start_row, with_undo)
    return _checked(weight, found)


def unmerge_rows(merged: AnyValues, prepared: Prepared, start_row: int, residual: Values) -> AnyValues:
    """Restore the rows that ``merge_rows`` was given, to the bit.

    Args:
        merged: (rows, in).
        prepared: the same changes in the same order.
        start_row: index of the first row in the whole weight.
        residual: (M,) int64 from ``merge_rows``.

    Raises:
        ValueError: the residual's length does not match this merge.
    """
    _check_rows(merged, prepared, start_row)
    weight, used = prepared.kernels.unmerge_rows(merged, prepared.factors, start_row, residual)
    _check_used(used, residual)
    return weight


def merge_affine(weight: Values, change: Tensor, gain: Tensor | None, with_undo: bool) -> RowsMerged:
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
    weight = as_tensor(weight)
    kernels = kernels_for(weight)
    merged = kernels.add_rounded(weight, change, gain)
    finite = all_finite(merged)
    whole = change if gain is None else change + (gain - 1) * weight.double()
    residual = torch.empty(0, dtype=torch.int64, device=weight.device)
    if with_undo and finite:
        residual = kernels.undo_residual(weight, merged, change, gain)
    return _checked(weight, RowsMerged(merged, residual, finite, *kernels.addition_sums(weight, merged, whole)))


def unmerge_affine(merged: Values, change: Tensor, gain: Tensor | None, residual: Values) -> Tensor:
    """Restore the rows that ``merge_affine`` was given, to the bit.

    Args:
        merged: (rows, in).
        change: the same bits as when merging.
        gain: the same bits as when merging.
        residual: (M,) int64 from ``merge_affine``.

    Raises:
        ValueError: the residual's length does not match this merge.
    """
    merged, residual = as_tensor(merged), as_tensor(residual)
    weight, used = kernels_for(merged).undo(merged, change, residual, gain)
    _check_used(used, residual)
    return weight


def _check_rows(weight: Values, prepared: Prepared, start_row: int) -> None:
    rows, columns = prepared.shape
    if weight.shape[1] != columns or not 0 <= start_row <= start_row + weight.shape[0] <= rows:
        raise ValueError(f"rows of shape {tuple(weight.shape)} from row {start_row} on are outside {prepared.shape}")


def _check_used(used: int, residual: Values) -> None:
    length = int(residual.shape[0])
    if used != length:
        raise ValueError(f"{used} weights are ambiguous, but it holds {length}")


def _checked(weight: Values, found: RowsMerged) -> RowsMerged:
    if found.finite:
        return found
    if not all_finite(weight):
        raise NonFiniteError("the weight holds NaN or infinity", hint="download the base again")
    raise NonFiniteError(
        "the merged weight overflows",
        hint="check that this is the right base, and that --weight and the adapter's lora_alpha are right",
    )
