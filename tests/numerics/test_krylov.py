"""Leading singular values by Krylov iteration match a dense decomposition, for many kinds of spectrum."""

import numpy as np
import pytest
import torch

from adaptkit.numerics.krylov import leading


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
