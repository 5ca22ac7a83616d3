"""A rounded addition and its exact undoing, in blocks that keep memory flat."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.errors import NonFiniteError
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.lora import LowRank, delta

_BLOCK_ELEMENTS = 1 << 20
"""Elements handled at a time; eight bytes each for the delta."""


@dataclass(frozen=True)
class Merged:
    """A weight after an addition.

    Attributes:
        weight: (out, in), rounded once.
        residual: (M,) int64, what ``unmerge`` needs; empty if it was not asked for.
        moved: number of weights whose value changed.
        delta_norm: Frobenius norm of the exact change.
        weight_norm: of the weight before.
        effect: ⟨effect, Δ⟩ / ⟨Δ, Δ⟩, where effect is what the rounded addition really changed; 1 where nothing is lost.
    """

    weight: Tensor
    residual: Tensor
    moved: int
    delta_norm: float
    weight_norm: float
    effect: float


def merge(weight: Tensor, terms: Sequence[LowRank], with_undo: bool = True) -> Merged:
    """Add low-rank changes to a weight: summed in float64, rounded once.

    Args:
        weight: (out, in) bfloat16, float16 or float32, finite.
        terms: the changes, each of shape (out, in), in the order in which they are added.
        with_undo: also find what the exact undoing needs.

    Raises:
        NonFiniteError: the weight is not finite, or the sum overflows its type.
    """
    kernels = kernels_for(weight.device)
    merged, moved = torch.empty_like(weight), 0
    residuals = [torch.empty(0, dtype=torch.int64, device=weight.device)]
    squared_delta = squared_weight = overlap = 0.0
    for rows in _row_slices(weight.shape):
        before, change = weight[rows], delta(terms, rows)
        after = kernels.add_rounded(before, change)
        for values, what in ((before, "holds NaN or infinity"), (after, "overflows")):
            if not all_finite(values):
                raise NonFiniteError(
                    f"the weight {what}", hint="is this the right base, and the adapter's scaling right?"
                )
        merged[rows] = after
        if with_undo:
            residuals.append(kernels.undo_residual(before, after, change))
        sums = kernels.addition_sums(before, after, change)
        moved += sums[0]
        squared_delta += sums[1]
        squared_weight += sums[2]
        overlap += sums[3]
    return Merged(
        weight=merged,
        residual=torch.cat(residuals),
        moved=moved,
        delta_norm=squared_delta**0.5,
        weight_norm=squared_weight**0.5,
        effect=overlap / squared_delta if squared_delta else 1.0,
    )


def unmerge(merged: Tensor, terms: Sequence[LowRank], residual: Tensor) -> Tensor:
    """Restore the weight that ``merge`` was given, to the bit.

    Args:
        merged: (out, in).
        terms: the same changes in the same order.
        residual: (M,) int64 from ``merge``.

    Raises:
        ValueError: the residual belongs to another merge.
    """
    kernels = kernels_for(merged.device)
    weight, start = torch.empty_like(merged), 0
    for rows in _row_slices(merged.shape):
        weight[rows], used = kernels.undo(merged[rows], delta(terms, rows), residual[start:])
        start += used
    if start != residual.numel():
        raise ValueError(f"{start} weights are ambiguous, the record holds {residual.numel()}")
    return weight


def _row_slices(shape: Sequence[int]) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // shape[1])
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
