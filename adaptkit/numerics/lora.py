"""Arithmetic of low-rank adapters: the canonical delta, inner products and norms.

A LoRA (arXiv:2106.09685) changes a weight W (out, in) by Δ = scaling · B A, with ``lora_a`` (rank, in) and
``lora_b`` (out, rank).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaptkit.lazy import torch
from adaptkit.numerics.arrays import Values, as_array, as_tensor
from adaptkit.numerics.kernels import kernels_for

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

    a: Values
    b: Values
    scaling: float

    @property
    def lora_a(self) -> Tensor:
        """A as a tensor, (rank, in)."""
        return as_tensor(self.a)

    @property
    def lora_b(self) -> Tensor:
        """B as a tensor, (out, rank)."""
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

    @property
    def is_of_arrays(self) -> bool:
        """Whether both factors are numpy arrays, so that torch is not needed."""
        return isinstance(self.a, np.ndarray) and isinstance(self.b, np.ndarray)


def delta(terms: Sequence[LowRank], rows: slice = slice(None)) -> Tensor:
    """Return the canonical Σ scaling · B A, the same bits on every machine; see ``kernels.reference.low_rank_delta``.

    Args:
        terms: at least one, all for the same weight.
        rows: rows of the weight to compute.

    Returns:
        (rows, in) float64.
    """
    lora_a, lora_b = side_by_side(terms, rows)
    ranks, scales = [term.rank for term in terms], [term.scaling for term in terms]
    return as_tensor(kernels_for(lora_a).low_rank_delta(lora_a, lora_b, ranks, scales))


def side_by_side(terms: Sequence[LowRank], rows: slice = slice(None)) -> tuple[Values, Values]:
    """Concatenate all A matrices, (Σ ranks, in), and the given rows of all B matrices, (rows, Σ ranks), in float32."""
    if all(term.is_of_arrays for term in terms):
        arrays = [(as_array(term.a), as_array(term.b)[rows]) for term in terms]
        lora_a = np.concatenate([a for a, _ in arrays], dtype=np.float32)
        return lora_a, np.concatenate([b for _, b in arrays], axis=1, dtype=np.float32)
    tensors = [(term.lora_a.float(), term.lora_b.float()[rows]) for term in terms]
    return torch.cat([a for a, _ in tensors]), torch.cat([b for _, b in tensors], dim=1)


def transposed(term: LowRank) -> LowRank:
    """Return the same change for the transposed weight, such as a GPT-2 Conv1D."""
    return LowRank(term.b.T, term.a.T, term.scaling)


def is_equal(first: LowRank, second: LowRank) -> bool:
    """Whether two changes have the same scaling and factors of equal values; dtypes may differ."""
    return (
        first.scaling == second.scaling
        and torch.equal(first.lora_a, second.lora_a)
        and torch.equal(first.lora_b, second.lora_b)
    )


def inner_products(first: LowRank, second: LowRank) -> tuple[float, float, float]:
    """Return ‖Δ₁‖², ⟨Δ₁, Δ₂⟩ and ‖Δ₂‖² in float64, as s₁ s₂ Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ) without forming an (out, in) matrix."""
    (a, b), (other_a, other_b) = (
        (as_array(term.a).astype(np.float64), as_array(term.b).astype(np.float64)) for term in (first, second)
    )
    s, t = first.scaling, second.scaling
    with np.errstate(over="ignore", invalid="ignore"):  # callers check for infinity and NaN
        one = float(((b.T @ b) * (a @ a.T)).sum())
        between = float(((b.T @ other_b) * (a @ other_a.T)).sum())
        two = float(((other_b.T @ other_b) * (other_a @ other_a.T)).sum())
    return one * s * s, between * s * t, two * t * t


def norm(term: LowRank) -> float:
    """Return the Frobenius norm of Δ."""
    nothing = LowRank(term.a[:0], term.b[:, :0], 0.0)
    return math.sqrt(max(0.0, inner_products(term, nothing)[0]))
