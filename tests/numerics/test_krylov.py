"""Leading singular values by Krylov iteration match a dense decomposition, for many kinds of spectrum."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adaptkit.numerics.krylov import leading, times


def with_spectrum(sigma, rows, columns):
    generator = torch.Generator().manual_seed(3)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(sigma), dtype=torch.float64, generator=generator))[0]
        for size in (rows, columns)
    )
    return (u * torch.as_tensor(sigma)) @ v.T


K = np.arange(1, 401)
SPECTRA = {
    "few": np.array([3.0, 2.0, 1e-3]),
    "one": np.array([1.0]),
    "steep": 0.7**K,
    "slow": 1 / K,
    "steps": np.repeat([9.0, 3.0, 1.0], [3, 7, 390]),
    "a tail": np.r_[np.full(8, 5.0), np.linspace(1.0, 0.9, 392)],
    "large": 1e30 / K**2,
    "small": 1e-30 / K**2,
}


@pytest.mark.parametrize("sigma", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("count", [1, 5, 8])
def test_leading_values_and_vectors_match_a_dense_decomposition(sigma, count):
    matrix = with_spectrum(sigma, 500, 450)
    found = leading(matrix, count)
    assert found is not None
    values, vectors = found
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)[:count]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6, atol=2.0**-24 * expected[0])
    assert torch.allclose(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), atol=1e-12)
    kept = float((matrix @ vectors).square().sum())
    assert kept == pytest.approx((expected**2).sum(), rel=1e-11)


def test_noise_gives_none():
    """Without a gap in the spectrum the iteration does not converge, and returns no unconverged values."""
    matrix = torch.randn(400, 350, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert leading(matrix, 4) is None


def test_a_zero_matrix_has_zero_singular_values():
    values, _ = leading(torch.zeros(500, 450, dtype=torch.float64), 4)
    assert not values.any()


def test_a_small_matrix_gives_none():
    assert leading(torch.ones(500, 100, dtype=torch.float64), 4) is None


@pytest.mark.parametrize("few", [1, 18, 24, 42])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_with_a_few_columns_is_the_product(few, turned):
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(70, 50, dtype=torch.float64, generator=generator)
    matrix = matrix.T if turned else matrix
    columns = torch.randn(matrix.shape[1], few, dtype=torch.float64, generator=generator)
    found = times(matrix, columns)
    assert found.shape == (len(matrix), few)
    np.testing.assert_allclose(found.numpy(), matrix.numpy() @ columns.numpy(), rtol=0, atol=1e-13)


class Widths(TorchDispatchMode):
    """Records the number of columns of each product with a large matrix."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.found = elements, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and args[0].numel() == self.elements:
            self.found.append(args[1].shape[1])
        return function(*args, **(kwargs or {}))


def test_products_with_the_matrix_have_whole_tiles_of_columns():
    matrix = with_spectrum(SPECTRA["steep"], 500, 450)
    with Widths(matrix.numel()) as watch:
        assert leading(matrix, 7) is not None
    assert len(watch.found) > 3
    assert all(width % 24 == 0 for width in watch.found)
