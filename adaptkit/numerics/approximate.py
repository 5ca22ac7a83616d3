"""A rounded addition undone by subtracting, where nothing was kept that would make it exact."""

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
    """A weight that may be a little off.

    Attributes:
        values: (rows, in) of the weight's type.
        bound: the most by which any of them can differ from the original.
    """

    values: Tensor
    bound: float


def subtract(merged: Tensor, terms: Sequence[LowRank], rows: slice) -> ErrorBound:
    """Subtract low-rank changes from a merged weight, rounding once.

    The merge rounded W + Δ to a number at most half a unit in its last place away, and the result is rounded again:
    the original is at most the sum of both halves away.

    Args:
        merged: (rows, in).
        terms: the changes of the whole weight, in the order of the merge.
        rows: which of its rows these are.
    """
    values = kernels_for(merged.device).add_rounded(merged, -lora.delta(terms, rows))
    bound = (_unit(merged) + _unit(values)).max() / 2 if merged.numel() else torch.zeros(())
    return ErrorBound(values, float(bound))


def _unit(values: Tensor) -> Tensor:
    """The distance between neighbouring numbers at each value, float64."""
    info = torch.finfo(values.dtype)
    exponent = torch.frexp(values.double().abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent)
