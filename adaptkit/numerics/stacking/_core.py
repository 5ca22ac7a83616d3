"""Core Space: the changes of all adapters in common bases, as matrices of at most (Σ ranks)².

With Q_b an orthonormal basis of the columns of [B_1 … B_T] and Q_a one of the rows of [A_1; …; A_T],

    Δ_t = s_t B_t A_t = Q_b M_t Q_aᵀ,    M_t = s_t (Q_bᵀ B_t)(A_t Q_a)

is exact, and any operation on singular vectors of the Δ_t can be done on those of the M_t. No (out, in) matrix is
formed. Everything is float64.

Source: Core Space (arXiv:2509.17786), with bases from QR instead of the paper's SVD. They span the same space, so no
method here gives a different result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._method import NoOptions

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Core:
    """The changes of one module by several adapters.

    Attributes:
        left: (out, k_b), orthonormal columns; k_b = min(out, Σ ranks).
        right: (in, k_a), orthonormal columns.
        matrices: (adapters, k_b, k_a).
    """

    left: Tensor
    right: Tensor
    matrices: Tensor

    def lift(self, left: Tensor, right: Tensor) -> LowRank:
        """Map factors (k_b, rank) and (rank, k_a) from the core to the weight: Q_b (left · right) Q_aᵀ, in float64."""
        return LowRank.of_tensors(right @ self.right.T, self.left @ left, 1.0)


def core_of(terms: Sequence[LowRank]) -> Core:
    """Express the changes of one module in common bases.

    Args:
        terms: one per adapter; one of rank 0 gives a matrix of zeros.
    """
    left, columns = torch.linalg.qr(torch.cat([term.lora_b.double() for term in terms], dim=1))
    right, rows = torch.linalg.qr(torch.cat([term.lora_a.double() for term in terms]).T)
    matrices, start = [], 0
    for term in terms:
        mine = slice(start, start + term.rank)
        matrices.append(term.scaling * (columns[:, mine] @ rows[:, mine].T))
        start += term.rank
    return Core(left, right, torch.stack(matrices))


def concatenated(terms: Sequence[LowRank]) -> LowRank:
    """Return the sum of the changes as [s_1 B_1 … s_T B_T] [A_1; …; A_T], in float64 factors."""
    lora_a = torch.cat([term.lora_a.double() for term in terms])
    lora_b = torch.cat([term.lora_b.double() * term.scaling for term in terms], dim=1)
    return LowRank.of_tensors(lora_a, lora_b, 1.0)


def add_up(terms: Sequence[LowRank], options: NoOptions, module: str) -> LowRank:
    """Return the sum of the changes: ``Method.combine`` of the methods that differ only in the rank they keep."""
    return concatenated(terms)


def nonzero(term: LowRank) -> bool:
    """Whether neither the scaling nor a factor of a change is zero."""
    return term.scaling != 0 and bool(term.lora_a.any()) and bool(term.lora_b.any())


def numerical_rank(sigma: Tensor, scale: float) -> int:
    """Return how many singular values are above rounding error.

    Args:
        sigma: (k,) float64, descending.
        scale: sum of the norms of the terms of the matrix, whose own norm may be much smaller if they cancel.
    """
    return int((sigma > 8 * _EPS * max(1, sigma.numel()) * scale).sum())


def nearest_isometry(columns: Tensor) -> Tensor:
    """Return P Qᵀ of the SVD P D Qᵀ: the matrix with orthonormal columns nearest to ``columns`` (Procrustes).

    Args:
        columns: (n, k) float64.

    Returns:
        (n, k). If the columns are linearly dependent, P Qᵀ is not unique; directions with d = 0 are then left out.
    """
    p, d, qt = torch.linalg.svd(columns, full_matrices=False)
    rank = numerical_rank(d, float(d[0]) if d.numel() else 0.0)
    nearest: Tensor = p[:, :rank] @ qt[:rank]
    return nearest
