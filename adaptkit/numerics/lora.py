"""Low-rank changes of weights, and their norms; ``exact`` adds them to weights.

A LoRA (arXiv:2106.09685) changes a weight W (out, in) by Δ = scaling · B A, with ``lora_a`` (rank, in) and
``lora_b`` (out, rank).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaptkit.numerics.dtypes import Array

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """One adapter's change of one weight.

    Attributes:
        a: (rank, in).
        b: (out, rank).
        scaling: α / rank, or α / √rank for rsLoRA, times the adapter's weight if it has one.
    """

    a: Array
    b: Array
    scaling: float

    @classmethod
    def of_tensors(cls, lora_a: Tensor, lora_b: Tensor, scaling: float) -> LowRank:
        """Return the change whose factors are tensors, which share their memory if they are contiguous on the CPU."""
        from adaptkit.numerics.tensors import as_array

        return cls(as_array(lora_a), as_array(lora_b), scaling)

    @property
    def lora_a(self) -> Tensor:
        """A as a tensor, (rank, in)."""
        from adaptkit.numerics.tensors import as_tensor

        return as_tensor(self.a)

    @property
    def lora_b(self) -> Tensor:
        """B as a tensor, (out, rank)."""
        from adaptkit.numerics.tensors import as_tensor

        return as_tensor(self.b)

    @property
    def rank(self) -> int:
        """The rank: rows of A and columns of B."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that it changes, (out, in)."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def weighted(self, weight: float) -> LowRank:
        """Return this change times ``weight``."""
        return LowRank(self.a, self.b, self.scaling * weight)


def transposed(term: LowRank) -> LowRank:
    """Return the same change for the transposed weight, such as a GPT-2 Conv1D."""
    return LowRank(term.b.T, term.a.T, term.scaling)


def is_equal(first: LowRank, second: LowRank) -> bool:
    """Whether two changes have the same scaling and factors of equal values; dtypes may differ."""
    pairs = ((first.a, second.a), (first.b, second.b))
    return first.scaling == second.scaling and all(
        np.array_equal(one.astype(np.float64), other.astype(np.float64)) for one, other in pairs
    )


def norm(term: LowRank) -> float:
    """Return the Frobenius norm of Δ in float64, as √(s² Σ (BᵀB ∘ AAᵀ)) without forming an (out, in) matrix."""
    a, b = term.a.astype(np.float64), term.b.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # callers check for infinity and NaN
        square = float(((b.T @ b) * (a @ a.T)).sum()) * term.scaling * term.scaling
    return math.sqrt(max(0.0, square))
