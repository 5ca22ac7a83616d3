"""KnOTS: align the changes in a common output basis by one SVD, and apply TIES to their coordinates.

    [Δ_1 … Δ_T] = U Σ [V_1 … V_T]        SVD of all changes, concatenated along their columns
    Δ = U · TIES(Σ V_1, …, Σ V_T)

Σ V_t = Uᵀ Δ_t are the coordinates of a change in common directions, (k, in) with k ≤ Σ ranks, so that corresponding
elements of different adapters mean the same. The SVD is that of the (Σ ranks)² matrices of Core Space; no (out, in)
matrix is formed.

Variant: KnOTS-TIES with Σ multiplied into V before trimming, as in the authors' code. Trimmed by module (theirs trims
over all modules at once); singular values that are zero up to rounding are left out; TIES as in ``ties``.
"""

from collections.abc import Sequence

import torch

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._core import core_of, numerical_rank
from adaptkit.numerics.stacking._elements import disjoint_mean, nth_largest, trim
from adaptkit.numerics.stacking._method import Method, count_kept
from adaptkit.numerics.stacking.ties import TiesOptions


def combine(terms: Sequence[LowRank], options: TiesOptions, module: str) -> LowRank:
    """Align, trim, elect, merge. Returns float64 factors."""
    core = core_of(terms)
    directions, sigma, _ = torch.linalg.svd(torch.cat(list(core.matrices), dim=1), full_matrices=False)
    directions = directions[:, : numerical_rank(sigma, float(core.matrices.square().sum().sqrt()))]
    coordinates = directions.T @ core.matrices @ core.right.T
    elements = coordinates[0].numel()
    kept = count_kept(options.density, elements, module) if elements else 0
    if kept < elements:
        least = [nth_largest(change.abs(), kept) for change in coordinates]
        coordinates = trim(coordinates, torch.tensor(least, dtype=torch.float64)[:, None, None])
    return LowRank.of_tensors(disjoint_mean(coordinates) * options.lambda_, core.left @ directions, 1.0)


METHOD = Method(
    combine,
    source="KnOTS (arXiv:2410.19735), TIES on the aligned ΣV by module, through Core Space (arXiv:2509.17786)",
    options=TiesOptions,
)
