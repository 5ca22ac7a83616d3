"""The largest singular values and vectors of a matrix that is read in row blocks and never held whole.

Randomized subspace iteration on the rows of D (out, in), with W (in, l) orthonormal:

    W ← orthonormal basis of l random columns
    repeated:  W ← orthonormal basis of Σ Dᵢᵀ (Dᵢ W) over the row blocks Dᵢ, which is Dᵀ D W
    at last:   Y = D W, and D ≈ Y Wᵀ, of which a small decomposition gives U, σ and Vᵀ

Source: Halko, Martinsson and Tropp (SIAM Review 53, 2011; arXiv:0909.4061), algorithm 4.4, from the right, so that one
pass over the blocks does both products of a power iteration. Everything is float64, in which the square of the
condition number that this costs is out of sight of weights in 16 or 32 bits.

Y Wᵀ is an orthogonal projection of D. So ‖D − Δ‖² = ‖D‖² − ‖Δ‖² for every truncation Δ of it: what is lost is known
exactly although D is not.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.errors import UsageError
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spectrum import Spectrum, dense_svd, svd

Blocks = Callable[[], Iterable[Tensor]]
"""Gives the rows of a matrix from the first to the last, in blocks (rows, in) float64; may be called repeatedly."""

_FIRST_RANK = 16
"""Where the search for a rank that keeps enough begins."""


@dataclass(frozen=True)
class Sketching:
    """How closely the leading subspace is found.

    Attributes:
        oversampling: columns beyond the rank; not negative.
        iterations: applications of DᵀD, one pass over the matrix each; at least 1.
        seed: of the random columns; from 0 on.
    """

    oversampling: int = 10
    iterations: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.oversampling < 0:
            raise UsageError(f"oversampling: must be at least 0, found {self.oversampling}", hint="10 is the default")
        if self.iterations < 1:
            raise UsageError(f"iterations: must be at least 1, found {self.iterations}", hint="3 is the default")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed: must be from 0 to 2^63 - 1, found {self.seed}")


@dataclass(frozen=True)
class Sketch:
    """The leading part of a matrix, and how much of it that is.

    Attributes:
        spectrum: of the projection: (out, k), (k,) and (k, in) float64; singular values are never above the true ones.
        square_norm: ‖D‖² of the whole matrix.
    """

    spectrum: Spectrum
    square_norm: float

    def energy_kept(self, rank: int) -> float:
        """The share of ‖D‖² in the first ``rank`` singular values; 1 for a zero matrix."""
        if self.square_norm == 0:
            return 1.0
        return min(1.0, float(self.spectrum.sigma[:rank].square().sum()) / self.square_norm)

    def rank_for(self, energy: float) -> int | None:
        """The smallest rank, at least 1, that keeps a share of ‖D‖²; None if the sketch holds none.

        A share of 1 is that of a residual no larger than float64 can tell from zero.
        """
        wanted = min(energy, 1 - 1e-13) * self.square_norm
        short = int((self.spectrum.sigma.square().cumsum(0) < wanted).sum())
        return None if short == self.spectrum.sigma.numel() and short > 0 else max(1, short + 1)


def sketch_for_rank(
    blocks: Blocks, shape: tuple[int, int], square_norm: float, rank: int, how: Sketching | None = None
) -> Sketch:
    """Find the leading ``rank`` singular values and vectors, and some more.

    Args:
        blocks: the matrix D.
        shape: (out, in) of it.
        square_norm: ‖D‖², as the sum of the squares of all elements.
        rank: at least 1.
        how: closely.

    Returns:
        min(rank + oversampling, out, in) singular values; where that is all, they are those of a dense decomposition.
    """
    how = how or Sketching()
    sketch, _ = _sketch(blocks, shape, square_norm, rank + how.oversampling, how, None)
    return sketch


def sketch_for_energy(
    blocks: Blocks,
    shape: tuple[int, int],
    square_norm: float,
    energy: float,
    max_rank: int,
    how: Sketching | None = None,
) -> tuple[Sketch, int]:
    """Widen the sketch, by doubling, until a rank in it keeps a share of ‖D‖², or until ``max_rank``.

    Args:
        blocks: the matrix D.
        shape: (out, in) of it.
        square_norm: ‖D‖².
        energy: the share, in (0, 1].
        max_rank: at least 1.
        how: closely.

    Returns:
        The last sketch, and the smallest rank that keeps the share, or ``max_rank`` (at most out and in) if none does.
    """
    how = how or Sketching()
    limit = min(max_rank, *shape)
    rank, basis = min(_FIRST_RANK, limit), None
    while True:
        sketch, basis = _sketch(blocks, shape, square_norm, rank + how.oversampling, how, basis)
        found = sketch.rank_for(energy)
        if found is not None and found <= rank:
            return sketch, found
        if rank == limit:
            return sketch, limit
        rank = min(2 * rank, limit)


def _sketch(
    blocks: Blocks, shape: tuple[int, int], square_norm: float, size: int, how: Sketching, basis: Tensor | None
) -> tuple[Sketch, Tensor | None]:
    """A sketch of ``size`` columns, and their orthonormal basis (in, size), from which a wider one may begin."""
    rows, columns = shape
    if size >= min(rows, columns):  # the sketch would be as large as the matrix
        return Sketch(dense_svd(torch.cat(list(blocks()))), square_norm), None
    known = 0 if basis is None else basis.shape[1]
    generator = torch.Generator().manual_seed(how.seed)
    fresh = torch.randn(size, columns, dtype=torch.float64, generator=generator)[known:].T  # none of them used before
    basis = _orthonormal(fresh if basis is None else torch.cat([basis, fresh], dim=1))
    for _ in range(how.iterations):
        image = torch.zeros(columns, size, dtype=torch.float64)
        for block in blocks():
            image.addmm_(block.T, block @ basis)
        basis = _orthonormal(image)
    projected = torch.cat([block @ basis for block in blocks()])
    return Sketch(svd(LowRank(basis.T, projected, 1.0)), square_norm), basis


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis
