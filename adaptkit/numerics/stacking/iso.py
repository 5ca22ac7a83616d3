"""Isotropic merging: sum, then replace the nonzero singular values of the sum by their mean.

    Σ_t w_t Δ_t = U diag(σ) Vᵀ,    Δ = λ · σ̄ · U Vᵀ,    σ̄ the mean of σ

Directions that only one adapter uses, which are weak in the sum, get the same strength as common ones. Truncated to a
rank, the result keeps the directions in which the sum was strongest.

Variant: Iso-C, decomposed in factored form, which is Core Space, so no (out, in) matrix is formed. The mean is over the
nonzero singular values, at most Σ ranks. The paper's mean is over all min(out, in) of a full matrix, which would spread
a low-rank sum over directions that no adapter has; λ = Σ ranks / min(out, in) gives the paper's magnitude.
"""

import math
from collections.abc import Sequence

import torch

from adaptkit.numerics import lora
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spectrum import Spectrum, svd
from adaptkit.numerics.stacking._core import concatenated, numerical_rank
from adaptkit.numerics.stacking._method import Method, ScaleOptions


def combine(terms: Sequence[LowRank], options: ScaleOptions, module: str) -> Spectrum:
    """Sum the changes and flatten the spectrum."""
    total = svd(concatenated(terms))
    rank = numerical_rank(total.sigma, sum(lora.norm(term) for term in terms))
    mean = float(total.sigma[:rank].mean()) if rank else 0.0
    flat = torch.full((rank,), mean * abs(options.lambda_), dtype=torch.float64)
    return Spectrum(total.u[:, :rank] * math.copysign(1.0, options.lambda_), flat, total.vt[:rank])


METHOD = Method(
    combine,
    source="isotropic merging (arXiv:2502.04959), Iso-C over the non-zero spectrum, in Core Space (arXiv:2509.17786)",
    options=ScaleOptions,
)
