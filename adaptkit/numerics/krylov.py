"""The leading singular values of a large matrix, by products with it alone, until nothing more of it is found.

A block of random columns, and what MᵀM makes of it again and again, span a space that soon holds the leading singular
vectors (block Krylov: Musco and Musco, arXiv:1504.05477). Here some eight products each way are enough, whatever the
size, where a dense decomposition needs as many as the matrix has columns. ``randomized`` takes a matrix that exists in
blocks only, and as many passes as it is told.
"""

import torch
from torch import Tensor

_MORE = 10
"""Columns of a block beyond those that are wanted, so that these converge where no gap follows them."""
_BLOCKS = 12
_GAIN = 2.0**-40
"""Share of what is found that a last block may have added. The next would add a hundredth of that."""


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The leading singular values and right singular vectors.

    Args:
        matrix: (rows, columns) float64, finite.
        count: at least 1.

    Returns:
        (count,) descending and (columns, count), as eigenvectors of MᵀM give them: values below 2⁻²⁴ of the largest are
        rounding. None if the matrix is too small to gain by this, or does not yield.
    """
    columns, width = matrix.shape[1], count + _MORE
    if 2 * _BLOCKS * width > columns:
        return None
    random = torch.randn(columns, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block, before = torch.linalg.qr(random)[0], 0.0
    basis, image = matrix.new_empty(columns, 0), matrix.new_empty(len(matrix), 0)
    for _ in range(_BLOCKS):
        basis, image = torch.cat([basis, block], dim=1), torch.cat([image, matrix @ block], dim=1)
        values, vectors = torch.linalg.eigh(image.T @ image)
        energy = float(values[-count:].sum())
        if energy - before <= _GAIN * energy:
            return values.flip(0)[:count].clamp(min=0).sqrt(), basis @ vectors.flip(1)[:, :count]
        before, block = energy, matrix.T @ image[:, -width:]
        for _ in range(2):  # where nothing is left, the first time leaves rounding, of any direction
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    return None
