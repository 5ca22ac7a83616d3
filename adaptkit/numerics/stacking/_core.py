"""Core Space: the changes of all adapters in common bases, where they are matrices of the size (Σ ranks)².

With Q_b an orthonormal basis of the columns of [B_1 … B_T] and Q_a one of the rows of [A_1; …; A_T],

    Δ_t = s_t B_t A_t = Q_b M_t Q_aᵀ,    M_t = s_t (Q_bᵀ B_t)(A_t Q_a)

loses nothing, and whatever is done with singular vectors of the Δ_t can be done with those of the M_t. No (out, in)
matrix is formed. Everything is float64.

Source: Core Space (arXiv:2509.17786), with bases from QR where its authors take those of an SVD: another basis of the
same space, of which no method here notices anything.
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
        """Take factors out of the core: Q_b (left · right) Q_aᵀ, in factors of float64.

        Args:
            left: (k_b, rank).
            right: (rank, k_a).
        """
        return LowRank(right @ self.right.T, self.left @ left, 1.0)


def core_of(terms: Sequence[LowRank]) -> Core:
    """Express the changes of one module in common bases.

    Args:
        terms: one per adapter; those of rank 0 have a matrix of zeros.
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
    """The sum of the changes as [s_1 B_1 … s_T B_T] [A_1; …; A_T], unrounded in float64."""
    lora_a = torch.cat([term.lora_a.double() for term in terms])
    lora_b = torch.cat([term.lora_b.double() * term.scaling for term in terms], dim=1)
    return LowRank(lora_a, lora_b, 1.0)


def add_up(terms: Sequence[LowRank], options: NoOptions, module: str) -> LowRank:
    """The sum of the changes, for methods that differ in how much of it they keep; see ``Method.combine``."""
    return concatenated(terms)


def nonzero(term: LowRank) -> bool:
    """Whether a change can be anything but zero."""
    return term.scaling != 0 and bool(term.lora_a.any()) and bool(term.lora_b.any())


def numerical_rank(sigma: Tensor, scale: float) -> int:
    """How many singular values are more than what rounding makes of 0.

    Args:
        sigma: (k,) float64, descending.
        scale: the size of what was added up to get the matrix; its norm may be much smaller.
    """
    return int((sigma > 8 * _EPS * max(1, sigma.numel()) * scale).sum())


def nearest_isometry(columns: Tensor) -> Tensor:
    """P Qᵀ of the SVD P D Qᵀ: the matrix nearest to ``columns`` whose columns are orthonormal (Procrustes).

    Args:
        columns: (n, k) float64.

    Returns:
        (n, k). Where the columns depend on each other, directions with d = 0 are left out, which alone is unique.
    """
    p, d, qt = torch.linalg.svd(columns, full_matrices=False)
    rank = numerical_rank(d, float(d[0]) if d.numel() else 0.0)
    nearest: Tensor = p[:, :rank] @ qt[:rank]
    return nearest
