"""Truncate a method's result to a rank, and measure how much of it is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.errors import NonFiniteError
from adaptkit.numerics import lora
from adaptkit.numerics.krylov import leading, times
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spectrum import Spectrum, energy_kept, rank_for_energy, svd
from adaptkit.numerics.stacking._core import numerical_rank
from adaptkit.numerics.stacking._method import Length

_FLOAT32_MAX = torch.finfo(torch.float32).max
_DENSE_RESOLUTION = 2.0**-24
"""Singular values below this share of ‖Δ‖ are lost in rounding, since they are computed from float64 squares."""

_ROUNDING = 2.0**-22
"""Share of the changes' norms below which their sum is only what rounding to float32 leaves."""


@dataclass(frozen=True)
class Limit:
    """How far to truncate; at most one of the two is given.

    Attributes:
        rank: the largest rank of a module, at least 1.
        energy: the smallest share of ‖Δ‖² to keep in each module, in (0, 1].
    """

    rank: int | None = None
    energy: float | None = None

    def choose(self, sigma: Tensor, default: int) -> int:
        """Return the rank to keep, from 1 to k.

        Args:
            sigma: (k,) the singular values above rounding error; at least one.
            default: rank if neither rank nor energy is given.
        """
        if self.energy is not None:
            return rank_for_energy(sigma, self.energy)
        return min(sigma.numel(), self.rank or default)


@dataclass(frozen=True)
class Compressed:
    """A change, truncated to the factors that are written.

    Attributes:
        term: the change in float32 factors.
        norm: ‖Δ‖ of the method's result.
        energy: ‖Δ_k‖² / ‖Δ‖², the share that the factors keep; 1 if ‖Δ‖ is 0.
        cancels: whether factors that are kept as given cancel each other, except for rounding.
    """

    term: LowRank
    norm: float
    energy: float
    cancels: bool = False

    @property
    def is_zero(self) -> bool:
        """Whether a factor is zero."""
        return not (bool(self.term.lora_a.any()) and bool(self.term.lora_b.any()))


def compress(
    result: LowRank | Spectrum | Tensor, terms: Sequence[LowRank], length: Length, limit: Limit, largest: int = 0
) -> Compressed:
    """Keep the largest singular values of a result.

    Args:
        result: result of a method for ``terms``.
        terms: one per adapter, weighted.
        length: rank to keep if ``limit`` gives neither rank nor energy.
        limit: rank or energy to keep.
        largest: largest rank of any adapter in any module; may be 0 if no other module has a larger rank.

    Raises:
        NonFiniteError: the result is NaN or too large for float32.
    """
    scale = float(sum(lora.norm(term) for term in terms))
    ranks = [term.rank for term in terms]
    default = max(largest, *ranks) if length == "largest" else sum(ranks)
    if isinstance(result, Tensor):
        return _compress_dense(result, scale, default, limit)
    if isinstance(result, LowRank):
        _check_magnitude(result.lora_a, result.lora_b)
    if isinstance(result, LowRank) and length == "as given" and limit == Limit():
        given = LowRank.of_tensors(result.lora_a.float(), result.lora_b.float(), result.scaling)
        norm = lora.norm(given)
        return Compressed(given, norm, 1.0, cancels=norm <= _ROUNDING * scale and scale > 0)
    spectrum = svd(result) if isinstance(result, LowRank) else result
    _check_magnitude(spectrum.sigma)
    sigma = spectrum.sigma[: numerical_rank(spectrum.sigma, scale)]
    if not sigma.numel():
        return _zero_change(*terms[0].shape)
    kept = limit.choose(sigma, default)
    return Compressed(spectrum.truncated(kept), float(sigma.norm()), energy_kept(sigma, kept))


def _compress_dense(delta: Tensor, scale: float, default: int, limit: Limit) -> Compressed:
    """Truncate a dense result, using singular vectors of one side only, which is faster than an SVD of Δ.

    Δ is projected onto the leading vectors, and the energy kept is measured on that projection.
    """
    _check_magnitude(delta)
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    norm = float(delta.norm())
    found = leading(tall, limit.rank or default) if limit.energy is None else None
    sigma, vectors = found or _all_singular(tall)
    sigma = sigma[: numerical_rank(sigma, scale)]
    sigma = sigma[sigma > _DENSE_RESOLUTION * norm]
    if not sigma.numel():
        return _zero_change(*delta.shape)
    kept = limit.choose(sigma, default)
    basis = vectors[:, :kept]
    spectrum = svd(LowRank.of_tensors(basis.T, times(tall, basis), 1.0))
    truncated = spectrum.truncated(kept)
    energy = min(1.0, float(spectrum.sigma.square().sum()) / norm**2)
    return Compressed(truncated if tall is delta else lora.transposed(truncated), norm, energy)


def _all_singular(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Return all singular values and right singular vectors, several times faster than an SVD."""
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    return values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _zero_change(out: int, columns: int) -> Compressed:
    """Return a change of zero, of rank 1 since PEFT has no smaller rank."""
    return Compressed(LowRank.of_tensors(torch.zeros(1, columns), torch.zeros(out, 1), 1.0), 0.0, 1.0)


def _check_magnitude(*factors: Tensor) -> None:
    for factor in factors:
        low, high = torch.aminmax(factor) if factor.numel() else (0.0, 0.0)
        if not (low >= -_FLOAT32_MAX and high <= _FLOAT32_MAX):  # also if they are NaN
            raise NonFiniteError("the result is too large for float32", hint="use a smaller --weight")
