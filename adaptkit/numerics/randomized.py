"""Largest singular values and vectors of a matrix that is read in row blocks and never held whole.

Randomized subspace iteration on D (out, in), with W (in, l) orthonormal:

    start:     W ← orthonormal basis of l random columns
    repeat:    W ← orthonormal basis of Dᵀ D W = Σ Dᵢᵀ (Dᵢ W), summed over the row blocks Dᵢ
    finally:   Y = D W; then D ≈ Y Wᵀ, and a small decomposition of that gives U, σ and Vᵀ

Source: Halko, Martinsson and Tropp (SIAM Review 53, 2011; arXiv:0909.4061), algorithm 4.4, applied from the right, so
that one pass over the blocks does both products of a power iteration. This squares the condition number; in float64,
which is used throughout, that does not matter for weights of 16 or 32 bits.

Y Wᵀ is an orthogonal projection of D, so ‖D − Δ‖² = ‖D‖² − ‖Δ‖² for every truncation Δ of its SVD: the error is known
exactly, without reading D again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spectrum import Spectrum, dense_svd, svd

Blocks = Callable[[], Iterable[Tensor]]
"""Returns the rows of a matrix from first to last, in blocks (rows, in) float64; called once per pass."""

_FIRST_RANK = 16
"""First rank that ``sketch_for_energy`` tries."""


@dataclass(frozen=True)
class Sketching:
    """Accuracy of the randomized SVD.

    Attributes:
        oversampling: number of columns beyond the rank; not negative.
        iterations: applications of DᵀD, one pass over the matrix each; at least 1.
        seed: seed of the random columns; not negative.
    """

    oversampling: int = 10
    iterations: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Sketch:
    """Leading singular values and vectors of a matrix, and the norm of the whole matrix.

    Attributes:
        spectrum: SVD of the projection: (out, k), (k,) and (k, in) float64; its singular values never exceed the true
            ones.
        square_norm: ‖D‖² of the whole matrix.
    """

    spectrum: Spectrum
    square_norm: float

    def energy_kept(self, rank: int) -> float:
        """Return the share of ‖D‖² in the first ``rank`` singular values; 1 for a zero matrix."""
        if self.square_norm == 0:
            return 1.0
        return min(1.0, float(self.spectrum.sigma[:rank].square().sum()) / self.square_norm)

    def rank_for(self, energy: float) -> int | None:
        """Return the smallest rank, at least 1, that keeps a share of ‖D‖²; None if no rank of the sketch does.

        Shares above 1 - 1e-13 count as 1 - 1e-13, since float64 cannot distinguish a smaller error from zero.
        """
        wanted = min(energy, 1 - 1e-13) * self.square_norm
        short = int((self.spectrum.sigma.square().cumsum(0) < wanted).sum())
        return None if short == self.spectrum.sigma.numel() and short > 0 else max(1, short + 1)


def sketch_for_rank(blocks: Blocks, shape: tuple[int, int], square_norm: float, rank: int, how: Sketching) -> Sketch:
    """Find the leading ``rank`` singular values and vectors, at least 1, and the oversampled ones.

    ``blocks`` are of a matrix D of shape (out, in), and ``square_norm`` is ‖D‖², the sum of all squares.

    Returns:
        min(rank + oversampling, out, in) singular values; if that is all of them, a dense SVD of D is used instead.
    """
    sketch, _ = _sketch(blocks, shape, square_norm, rank + how.oversampling, how, None)
    return sketch


def sketch_for_energy(
    blocks: Blocks,
    shape: tuple[int, int],
    square_norm: float,
    energy: float,
    max_rank: int,
    how: Sketching,
) -> tuple[Sketch, int]:
    """Double the rank of the sketch until some rank in it keeps a share of ‖D‖², in (0, 1], or until ``max_rank``.

    Returns:
        The last sketch, and the smallest rank that keeps the share, or min(max_rank, out, in) if none does.
    """
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
    """Compute a sketch of ``size`` columns, from random ones or from those of a narrower sketch, (in, fewer).

    Returns:
        The sketch, and its orthonormal basis (in, size), or None if a dense SVD was used.
    """
    rows, columns = shape
    if size >= min(rows, columns):  # the sketch would be as large as the matrix
        return Sketch(dense_svd(torch.cat(list(blocks()))), square_norm), None
    known = 0 if basis is None else basis.shape[1]
    generator = torch.Generator().manual_seed(how.seed)
    fresh = torch.randn(size, columns, dtype=torch.float64, generator=generator)[known:].T  # skip those already used
    basis = _orthonormal(fresh if basis is None else torch.cat([basis, fresh], dim=1))
    for _ in range(how.iterations):
        image = torch.zeros(columns, size, dtype=torch.float64)
        for block in blocks():
            image.addmm_(block.T, block @ basis)
        basis = _orthonormal(image)
    projected = torch.cat([block @ basis for block in blocks()])
    return Sketch(svd(LowRank.of_tensors(basis.T, projected, 1.0)), square_norm), basis


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis
