"""Leading singular values of a large matrix M by block Krylov iteration, run until it converges.

A block of random columns and its products with powers of MᵀM span a space that soon contains the leading singular
vectors (Musco and Musco, arXiv:1504.05477). About eight products each with M and Mᵀ are enough at any size; a dense
decomposition costs as many as the matrix has columns. ``randomized`` is for a matrix that is available only in blocks,
with a fixed number of passes.
"""

import torch
from torch import Tensor

_OVERSAMPLING = 10
"""Oversampling: extra columns of a block, so that the wanted ones converge even if no spectral gap follows them."""
_BLOCKS = 12
"""Largest number of blocks."""
_TILE_COLUMNS = 24
"""Products have a multiple of this many columns. Columns beyond the last tile of registers can take several times as
long as a tile. The tiles of MKL have 12 columns with AVX2, and 24 with AVX-512."""
_TOLERANCE = 2.0**-40
"""Converged if the last block adds at most this share of Σσ². The next block would add about a hundredth of that."""


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Return the leading singular values and right singular vectors.

    Args:
        matrix: (rows, columns) float64, finite.
        count: number of singular values, at least 1.

    Returns:
        (count,) descending and (columns, count). They come from eigenvectors of a projection of MᵀM, so values below
        about 2⁻²⁴ of the largest are rounding errors. None if the matrix is too small to be faster this way, or if the
        iteration does not converge.
    """
    columns, width = matrix.shape[1], count + _OVERSAMPLING
    if 2 * _BLOCKS * width > columns:
        return None
    random = torch.randn(columns, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block, before = torch.linalg.qr(random)[0], 0.0
    basis, image = matrix.new_empty(columns, 0), matrix.new_empty(len(matrix), 0)
    for _ in range(_BLOCKS):
        basis, image = torch.cat([basis, block], dim=1), torch.cat([image, times(matrix, block)], dim=1)
        values, vectors = torch.linalg.eigh(image.T @ image)
        energy = float(values[-count:].sum())
        if energy - before <= _TOLERANCE * energy:
            return values.flip(0)[:count].clamp(min=0).sqrt(), basis @ vectors.flip(1)[:, :count]
        before, block = energy, times(matrix.T, image[:, -width:])
        for _ in range(2):  # twice: if the block is nearly in the basis, the first pass leaves only rounding errors
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return None


def times(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return the product with a few columns, padded to whole tiles of the matrix library.

    Args:
        matrix: (rows, k) float64, contiguous or transposed.
        columns: (k, few) float64.
    """
    few = columns.shape[1]
    product: Tensor = matrix @ torch.nn.functional.pad(columns, (0, -few % _TILE_COLUMNS))
    return product[:, :few]
