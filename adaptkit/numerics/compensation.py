"""The companion adapter: the low-rank part of what quantization lost, weighted by what goes through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import UsageError
from adaptkit.lazy import torch
from adaptkit.numerics.rounding import damped

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
"""Share of the mean second moment added to the diagonal."""

_ITERATIONS = 12


def companion_adapter(lost: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The adapter of a given rank that gives a quantized linear most of its outputs back.

    Minimizes E‖(lost - B A) x‖². With any root of the damped second moments, H = R Rᵀ, that is ‖(lost - B A) R‖², so
    B A R is the truncated singular value decomposition of lost · R.

    Args:
        lost: (out, in) original minus decoded weight, floating point.
        second_moment: (in,) E[x²] of each input, or all of E[x xᵀ] as (in, in).
        rank: from 1 to min(out, in).

    Returns:
        lora_a: (rank, in) float32.
        lora_b: (out, rank) float32; to be used with scaling 1. The two vectors of a component have the same norm.

    Raises:
        UsageError: a rank or second moments that do not belong to the weight.

    Source: QERA (arXiv:2410.06040), "approx" for the diagonal and "exact" for the matrix; the decomposition by
    subspace iteration from a fixed start (arXiv:0909.4061, algorithm 4.4) instead of a full one.
    """
    rows, columns = lost.shape
    if not 1 <= rank <= min(rows, columns):
        raise UsageError(f"rank {rank}: must be from 1 to {min(rows, columns)}", hint="choose a smaller rank")
    if second_moment.shape not in ((columns,), (columns, columns)):
        raise UsageError(f"second moments {list(second_moment.shape)} do not belong to a weight {[rows, columns]}")
    error = lost.double()
    if second_moment.dim() == 1:
        moments = second_moment.double()
        mean = float(moments.mean())
        root = (moments + DAMPING * mean).sqrt() if mean > 0 else torch.ones_like(moments)
        u, s, v = _leading(error * root, rank)
        lora_a = v.T / root
    else:
        lower = torch.linalg.cholesky(damped(second_moment, DAMPING))
        u, s, v = _leading(error @ lower, rank)
        lora_a = torch.linalg.solve_triangular(lower.T, v, upper=True).T
    lora_b = u * s
    norms_a, norms_b = lora_a.norm(dim=1), lora_b.norm(dim=0)
    balance = torch.where(norms_b > 0, (norms_b / norms_a).sqrt(), torch.zeros_like(norms_b))
    inverse = torch.where(balance > 0, 1 / balance, torch.zeros_like(balance))
    return (lora_a * balance.unsqueeze(1)).float(), (lora_b * inverse).float()


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets: (out, rank), (rank,), (in, rank)."""
    width = min(2 * rank + 16, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64)
    for _ in range(_ITERATIONS):
        basis, _r = torch.linalg.qr(matrix.T @ (matrix @ basis))
    u, s, vh = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u[:, :rank], s[:rank], basis @ vh[:rank].T
