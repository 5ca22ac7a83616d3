"""The companion adapter: a low-rank approximation of the quantization error, weighted by the activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.errors import UsageError
from adaptkit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
"""Share of the mean second moment that is added to each second moment."""

_ITERATIONS = 12


def companion_adapter(lost: Tensor, mean_square: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the adapter of a given rank that best restores the outputs of a quantized linear.

    Minimizes E‖(lost - B A) x‖², treating inputs as uncorrelated. With R the square root of the diagonal matrix of
    damped second moments, that is ‖(lost - B A) R‖², so B A R is the truncated SVD of lost · R.

    Args:
        lost: (out, in) original minus dequantized weight, floating point.
        mean_square: (in,) E[x²] of each input.
        rank: from 1 to min(out, in).

    Returns:
        lora_a: (rank, in) float32.
        lora_b: (out, rank) float32, for scaling 1. Column i of B has the norm of row i of A.

    Raises:
        UsageError: the rank or the shape of the second moments does not fit the weight.

    Source: QERA (arXiv:2410.06040), "approx", for the diagonal of E[x xᵀ]; with subspace iteration from a fixed start
    (arXiv:0909.4061, algorithm 4.4) instead of a full decomposition.
    """
    rows, columns = lost.shape
    if not 1 <= rank <= min(rows, columns):
        raise UsageError(f"rank: must be from 1 to {min(rows, columns)}, found {rank}", hint="choose a smaller rank")
    if mean_square.shape != (columns,):
        raise UsageError(
            f"second moments of shape {list(mean_square.shape)} do not fit a weight of shape {[rows, columns]}"
        )
    moments = mean_square.double()
    mean = float(moments.mean())
    root = (moments + DAMPING * mean).sqrt() if mean > 0 else torch.ones_like(moments)
    u, s, v = _leading(lost.double() * root, rank)
    lora_a = v.T / root
    lora_b = u * s
    norms_a, norms_b = lora_a.norm(dim=1), lora_b.norm(dim=0)
    balance = torch.where(norms_b > 0, (norms_b / norms_a).sqrt(), torch.zeros_like(norms_b))
    inverse = torch.where(balance > 0, 1 / balance, torch.zeros_like(balance))
    return (lora_a * balance.unsqueeze(1)).float(), (lora_b * inverse).float()


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets: (out, rank), (rank,), (in, rank)."""
    width = min(2 * rank + 16, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64)
    for _ in range(_ITERATIONS):
        basis, _r = torch.linalg.qr(matrix.T @ (matrix @ basis))
    u, s, vh = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u[:, :rank], s[:rank], basis @ vh[:rank].T
