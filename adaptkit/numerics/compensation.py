"""The companion adapter: a low-rank approximation of the quantization error, weighted by the activations."""

import torch
from torch import Tensor

from adaptkit.errors import UsageError
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.tensors import as_array, as_tensor

DAMPING = 0.01
"""Share of the mean second moment that is added to each second moment."""

_ITERATIONS = 12


def companion_adapter(lost: Array, mean_square: Array, rank: int) -> tuple[Array, Array]:
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
    moments = as_tensor(mean_square).double()
    mean = float(moments.mean())
    root = (moments + DAMPING * mean).sqrt() if mean > 0 else torch.ones_like(moments)
    u, s, v = _leading(as_tensor(lost).double() * root, rank)
    lora_a = v.T / root
    lora_b = u * s
    balance = (lora_b.norm(dim=0) / lora_a.norm(dim=1)).sqrt()
    inverse = torch.where(balance > 0, 1 / balance, 0)
    return as_array((lora_a * balance.unsqueeze(1)).float()), as_array((lora_b * inverse).float())


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets: (out, rank), (rank,), (in, rank)."""
    width = min(2 * rank + 16, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64)
    for _ in range(_ITERATIONS):
        basis, _r = torch.linalg.qr(matrix.T @ (matrix @ basis))
    u, s, vh = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u[:, :rank], s[:rank], basis @ vh[:rank].T
