"""Undo a rounded addition by subtracting, when no residual was stored that would make it exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptkit.lazy import torch
from adaptkit.numerics import lora
from adaptkit.numerics.kernels import kernels_for
from adaptkit.numerics.lora import LowRank

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ErrorBound:
    """Approximate values of a weight, with a bound on their error.

    Attributes:
        values: (rows, in), of the weight's dtype.
        bound: upper bound on the difference between any value and the original.
    """

    values: Tensor
    bound: float


def subtract(merged: Tensor, terms: Sequence[LowRank], rows: slice) -> ErrorBound:
    """Subtract low-rank changes from a merged weight, rounding once.

    The merge rounded W + Δ by at most half a unit in the last place, and the subtraction rounds once more, so the
    error is at most the sum of both halves.

    Args:
        merged: (rows, in).
        terms: the changes of the whole weight, in the order of the merge.
        rows: position of the rows in the whole weight.
    """
    values = kernels_for(merged.device).add_rounded(merged, -lora.delta(terms, rows))
    bound = (_unit(merged) + _unit(values)).max() / 2 if merged.numel() else torch.zeros(())
    return ErrorBound(values, float(bound))


def _unit(values: Tensor) -> Tensor:
    """Return the distance between neighbouring floats at each value (the unit in the last place), float64."""
    info = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double().abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent)
