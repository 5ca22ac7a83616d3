"""TSV-Merge: take each adapter's leading singular vectors, orthogonalize them across adapters, and sum.

    Δ_t ≈ U_t Σ_t V_tᵀ           the leading k = ⌊min(out, in) / T⌋ singular values, at least 1
    Û = [U_1 … U_T] = P D Qᵀ     nearest matrix with orthonormal columns (Procrustes): U_⊥ = P Qᵀ; the same for V
    Δ = λ · U_⊥ diag(Σ_1, …, Σ_T) V_⊥ᵀ

So the directions of one task no longer overlap with those of another.

Variant: TSV-M, in Core Space, so no (out, in) matrix is formed. T counts the adapters that change the module. Only
nonzero singular values are used: beyond its rank a change has no directions, and the arbitrary ones that an SVD of the
full matrix returns would disturb the others. If vectors of several adapters are linearly dependent, P Qᵀ is not unique;
directions with D = 0 are then left out, so that an adapter stacked with itself gives itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._core import concatenated, core_of, nearest_isometry, nonzero, numerical_rank
from adaptkit.numerics.stacking._method import Method, ScaleOptions


def _leading(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return at most ``most`` leading nonzero singular values and their vectors: U (k_b, k), σ (k,), V (k_a, k)."""
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(most, numerical_rank(sigma, float(sigma[0])))
    return u[:, :rank], sigma[:rank], vt[:rank].T


def combine(terms: Sequence[LowRank], options: ScaleOptions, module: str) -> LowRank:
    """Orthogonalize and sum. Returns float64 factors."""
    working = [term for term in terms if nonzero(term)]
    if not working:
        return concatenated(terms)
    core = core_of(working)
    most = max(1, min(working[0].shape) // len(working))
    u, sigma, v = zip(*(_leading(matrix, most) for matrix in core.matrices), strict=True)
    left = nearest_isometry(torch.cat(u, dim=1)) * torch.cat(sigma) * options.lambda_
    return core.lift(left, nearest_isometry(torch.cat(v, dim=1)).T)


METHOD = Method(
    combine,
    source="TSV-Merge (arXiv:2412.00081), TSV-M on the non-zero singular values, in Core Space (arXiv:2509.17786)",
    options=ScaleOptions,
)
