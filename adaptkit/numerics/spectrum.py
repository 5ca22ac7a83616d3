"""Singular values of low-rank changes, computed from the factors without forming an (out, in) matrix.

Δ = s · B A with B = Q_b R_b and Aᵀ = Q_a R_a has the singular values of the small matrix s · R_b R_aᵀ.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.numerics.lora import LowRank


@dataclass(frozen=True)
class Spectrum:
    """A singular value decomposition Δ = U diag(σ) Vᵀ, float64.

    Attributes:
        u: (out, k), orthonormal columns; the entry of largest magnitude in each is positive.
        sigma: (k,), descending, not negative.
        vt: (k, in), orthonormal rows.
    """

    u: Tensor
    sigma: Tensor
    vt: Tensor

    def truncated(self, rank: int) -> LowRank:
        """Return the best approximation of this rank (Eckart and Young) as an adapter with scaling 1.

        √σ is multiplied into both factors, so that their norms are equal; each is rounded once to float32.
        """
        root = self.sigma[:rank].sqrt()
        lora_b = self.u[:, :rank] * root
        lora_a = root[:, None] * self.vt[:rank]
        return LowRank.of_tensors(lora_a.float().contiguous(), lora_b.float().contiguous(), 1.0)


def svd(term: LowRank) -> Spectrum:
    """Decompose s · B A by two QR decompositions and one small SVD.

    Returns:
        k = min(rank, out, in) singular values and vectors.
    """
    q_b, r_b = torch.linalg.qr(term.lora_b.double())
    q_a, r_a = torch.linalg.qr(term.lora_a.double().T)
    u, sigma, vt = torch.linalg.svd(term.scaling * (r_b @ r_a.T), full_matrices=False)
    return _with_signs(q_b @ u, sigma, vt @ q_a.T)


def dense_svd(matrix: Tensor) -> Spectrum:
    """Decompose a dense matrix (out, in)."""
    return _with_signs(*torch.linalg.svd(matrix.double(), full_matrices=False))


def singular_values(term: LowRank) -> Tensor:
    """Return the singular values of s · B A without vectors: (min(rank, out, in),) float64, descending."""
    _, r_b = torch.linalg.qr(term.lora_b.double(), mode="r")
    _, r_a = torch.linalg.qr(term.lora_a.double().T, mode="r")
    values: Tensor = torch.linalg.svdvals(term.scaling * (r_b @ r_a.T))
    return values


def energy_kept(sigma: Tensor, rank: int) -> float:
    """Return the share of Σσ² in the first ``rank`` singular values; 1 for a zero matrix."""
    total = float(sigma.square().sum())
    return float(sigma[:rank].square().sum()) / total if total else 1.0


def rank_for_energy(sigma: Tensor, energy: float) -> int:
    """Return the smallest rank, at least 1, that keeps a share of Σσ².

    Args:
        sigma: (k,) descending.
        energy: the share, in (0, 1]; 1 keeps all singular values above rounding error.
    """
    if energy == 1:
        top = float(sigma[0]) if sigma.numel() else 0.0
        return max(1, int((sigma > top * sigma.numel() * torch.finfo(torch.float64).eps).sum()))
    shares = sigma.square().cumsum(0)
    wanted = energy * float(shares[-1]) if shares.numel() else 0.0
    return max(1, min(sigma.numel(), int((shares < wanted).sum()) + 1))


def effective_rank(sigma: Tensor) -> float:
    """Return exp of the entropy of σ / Σσ (Roy and Vetterli, 2007); 0 for a zero matrix."""
    total = float(sigma.sum())
    if total == 0:
        return 0.0
    shares = sigma[sigma > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(sigma: Tensor) -> float:
    """Return ‖Δ‖² / σ₁²; 0 for a zero matrix."""
    return float(sigma.square().sum() / sigma[0].square()) if sigma.numel() and float(sigma[0]) > 0 else 0.0


def _with_signs(u: Tensor, sigma: Tensor, vt: Tensor) -> Spectrum:
    """Fix the signs, which an SVD leaves open: make the entry of largest magnitude in each column of U positive."""
    if u.numel():
        largest = u.gather(0, u.abs().argmax(0, keepdim=True))
        signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
        u, vt = u * signs, vt * signs.T
    return Spectrum(u, sigma, vt)
