"""Comparison of two low-rank changes of one weight in factored form, and of two plain tensors piece by piece.

For two low-rank changes Δᵢ = sᵢ Bᵢ Aᵢ, take the QR decompositions [B₁ B₂] = Q_b [C₁ C₂] and [A₁ᵀ A₂ᵀ] = Q_a [D₁ D₂].
Norms, angles and singular values do not depend on Q_b and Q_a, so they are computed from the cores Mᵢ = sᵢ Cᵢ Dᵢᵀ, at
most (r₁ + r₂) square: neither an (out, in) matrix nor a Q is ever formed. Everything is float64.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.lora import LowRank, is_equal
from adaptkit.numerics.spectrum import effective_rank
from adaptkit.numerics.tensors import as_tensor

SAMPLED_ROWS = 64
"""Number of rows of Δ on which sign agreement is measured."""
_SEED = 0
_NEGLIGIBLE = 1e-12  # share of ‖D‖² that float64 sums cannot distinguish from zero


@dataclass(frozen=True)
class Overlap:
    """Overlap of two subspaces of the same space.

    Attributes:
        cosines: of the principal angles, descending; as many as the smaller dimension; 1 for a common direction.
        rms: their root mean square, ‖UᵀV‖ / √min(dimensions): 0 if orthogonal, 1 if one contains the other.
        random: expected ``rms`` of random subspaces of these dimensions: √(max(dimensions) / space). The mean of ‖UᵀV‖²
            over independent uniformly random subspaces is exactly r₁ r₂ / m; for r₁ = r₂ = r this gives the √(r/m) of
            the literature. The expected largest cosine is higher.
    """

    cosines: tuple[float, ...]
    rms: float
    random: float


@dataclass(frozen=True)
class ChangeComparison:
    """Comparison of two changes of one weight.

    Attributes:
        sigmas: singular values of each change, (min(rank, out, in),) float64, descending.
        difference_sigma: singular values of Δ₁ − Δ₂.
        inner: ⟨Δ₁, Δ₂⟩.
        columns: overlap of the column spaces, in the space of outputs; None if a change is zero.
        rows: overlap of the row spaces, in the space of inputs; None likewise.
        interference: ‖(UᵀU − I) Σ (VᵀV − I)‖₁, the sum of absolute values, with U = [U₁ U₂], V = [V₁ V₂] and Σ the
            diagonal matrix of both changes' singular values: the singular task interference of Task Singular Vectors
            (arXiv:2412.00081), here over all singular vectors instead of a share of them. 0 for orthogonal changes.
        sign_agreement: share of elements with the same sign, among the elements of ``sampled_rows`` that are nonzero in
            both changes; None if there are none.
    """

    sigmas: tuple[Tensor, Tensor]
    difference_sigma: Tensor
    inner: float
    columns: Overlap | None
    rows: Overlap | None
    interference: float
    sign_agreement: float | None

    @property
    def interference_share(self) -> float:
        """``interference`` divided by the sum of both changes' singular values: 1 for a change and itself."""
        total = float(self.sigmas[0].sum() + self.sigmas[1].sum())
        return self.interference / total if total else 0.0


def compare(first: LowRank, second: LowRank) -> ChangeComparison:
    """Compare two changes of a weight.

    Subspaces are spanned by the singular vectors with σ > σ₁ · max(out, in) · 2⁻⁵²; smaller values are rounding errors.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"changes of shapes {first.shape} and {second.shape} cannot be compared")
    tolerance = max(first.shape) * torch.finfo(torch.float64).eps
    core_1, core_2 = _cores(first, second)
    u_1, sigma_1, v_1 = _truncated_svd(core_1, tolerance)
    u_2, sigma_2, v_2 = _truncated_svd(core_2, tolerance)
    left, right = u_1.T @ u_2, v_1.T @ v_2
    counts = (u_1.shape[1], u_2.shape[1])
    crossed = (left * sigma_2[: counts[1]]) @ right.T, (left.T * sigma_1[: counts[0]]) @ right
    limits = [min(term.rank, *term.shape) for term in (first, second)]
    return ChangeComparison(
        sigmas=(sigma_1[: limits[0]], sigma_2[: limits[1]]),
        difference_sigma=torch.linalg.svdvals(core_1 - core_2),
        inner=float((core_1 * core_2).sum()),
        columns=_overlap(left, first.shape[0]),
        rows=_overlap(right, first.shape[1]),
        interference=float(crossed[0].abs().sum() + crossed[1].abs().sum()),  # the other two of four blocks are zero
        sign_agreement=_sign_agreement(first, second),
    )


def sampled_rows(count: int) -> Tensor:
    """Return the rows on which sign agreement is measured: all ``count``, or 64 drawn with a fixed seed, ascending."""
    if count <= SAMPLED_ROWS:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))[:SAMPLED_ROWS].sort().values


def _cores(first: LowRank, second: LowRank) -> tuple[Tensor, Tensor]:
    """Return the cores M₁ and M₂ (see the module's docstring), in a common basis and of the same shape."""
    if is_equal(first, second):  # else rounding would give a difference of a few times 1e-16
        core = first.scaling * _r_factor(first.lora_b) @ _r_factor(first.lora_a.T).T
        return core, core
    b = _r_factor(torch.cat([first.lora_b.double(), second.lora_b.double()], dim=1))
    a = _r_factor(torch.cat([first.lora_a.double(), second.lora_a.double()]).T)
    rank = first.rank
    return first.scaling * b[:, :rank] @ a[:, :rank].T, second.scaling * b[:, rank:] @ a[:, rank:].T


def _r_factor(columns: Tensor) -> Tensor:
    triangle: Tensor = torch.linalg.qr(columns.double(), mode="r")[1]
    return triangle


def _truncated_svd(core: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return U for the singular values above ``tolerance`` · σ₁, all singular values, and V for those above it."""
    u, sigma, vt = torch.linalg.svd(core, full_matrices=False)
    count = int((sigma > tolerance * sigma[0]).count_nonzero())
    return u[:, :count], sigma, vt[:count].T


def _overlap(products: Tensor, space: int) -> Overlap | None:
    """Return the overlap of two subspaces of a space of this dimension, from the inner products of their bases."""
    if not products.numel():
        return None
    cosines = torch.linalg.svdvals(products).clamp(max=1.0)
    rms = float(cosines.square().mean().sqrt())
    return Overlap(tuple(cosines.tolist()), rms, math.sqrt(max(products.shape) / space))


def _sign_agreement(first: LowRank, second: LowRank) -> float | None:
    rows = sampled_rows(first.shape[0])
    one, two = (term.lora_b[rows].double() @ term.lora_a.double() for term in (first, second))
    products = one.mul_(two).mul_(_sign(first.scaling) * _sign(second.scaling))
    known = int(products.count_nonzero())
    return int((products > 0).count_nonzero()) / known if known else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


@dataclass
class Tally:
    """Running sums over the pieces of two tensors.

    Attributes:
        squares: sums of squares of the first tensor, the second, and their difference, in float64.
        changed: number of elements whose bits differ, or whose values differ if the dtypes differ.
        compared: number of elements compared.
    """

    squares: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    changed: int = 0
    compared: int = 0

    def add(self, first: Array, second: Array) -> None:
        """Add two pieces of the same shape, of floating-point or integer dtype."""
        self.compared += first.size
        one, two = (as_tensor(piece).double().reshape(-1) for piece in (first, second))
        unlike = _bits(first) != _bits(second) if first.dtype == second.dtype else (one != two).numpy()
        self.changed += int(np.count_nonzero(unlike))
        for place, values in enumerate((one, two, one - two)):
            self.squares[place] += float(values.dot(values))

    @property
    def norms(self) -> tuple[float, float, float] | None:
        """Norms of both and of their difference; None if values are NaN or infinite, or squares overflow float64."""
        first, second, difference = (math.sqrt(square) if square >= 0 else math.nan for square in self.squares)
        return (first, second, difference) if math.isfinite(first + second + difference) else None


def effective_rank_with_tail(sigma: Tensor, square_norm: float, count: int) -> float:
    """Estimate ``spectrum.effective_rank`` from above when only the largest singular values are known.

    The rest of ‖D‖² is spread evenly over the unknown singular values, which gives the largest possible entropy and
    fits rounding noise, whose spectrum is nearly flat.

    Args:
        sigma: (k,) the known singular values, descending.
        square_norm: ‖D‖².
        count: number of all singular values.
    """
    rest, others = square_norm - float(sigma.square().sum()), count - sigma.numel()
    if others <= 0 or rest <= _NEGLIGIBLE * square_norm:
        return effective_rank(sigma)
    return effective_rank(torch.cat([sigma, torch.full((others,), math.sqrt(rest / others), dtype=sigma.dtype)]))


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")
