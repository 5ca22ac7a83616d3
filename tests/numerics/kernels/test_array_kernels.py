"""The factors' bounds match their formulas; the squared error that formats report is that of the weights."""

import numpy as np
import pytest
import torch

from adaptkit.formats import fp4, nf4
from adaptkit.numerics.absmax import squared_errors
from adaptkit.numerics.kernels import _cpu_factors
from adaptkit.numerics.tensors import as_array


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (3, 77), (1, 1)])
@pytest.mark.parametrize("form", [nf4.FORMAT, fp4.FORMAT], ids=lambda form: form.name)
def test_the_squared_error_from_moments_is_that_of_the_decoded_weights(form, shape, dtype):
    weight = as_array(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    codes, absmax, moments = form.quantize(weight, 64, measure=True)
    whole = float(moments[:, 0].sum(dtype=np.float64))
    lost = squared_errors(whole, np.ascontiguousarray(moments[:, 1:]), absmax)
    decoded = form.dequantize(codes, absmax, weight.size, 64, np.dtype(np.float32)).reshape(shape)
    wide = weight.astype(np.float64)
    assert lost == pytest.approx(np.square(wide - decoded).sum(), rel=1e-4, abs=1e-5 * whole)
    assert whole == pytest.approx(np.square(wide).sum(), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (7, 768), (5, 2000)])
def test_bounds_and_inner_products_of_the_factors_match_their_formulas(shape):
    """The trusted range of float32 arithmetic depends on them."""
    generator = np.random.default_rng(3)
    a = (generator.standard_normal(shape) * generator.uniform(0, 2, shape[1])).astype(np.float32)
    ranks, scales = ([shape[0]], [0.7]) if shape[0] == 1 else ([2, shape[0] - 2], [0.7, -3.0])
    factors = _cpu_factors.prepare(a, np.ones((4, shape[0]), np.float32), ranks, scales)
    norm, largest = factors._bounds
    wide = a.astype(np.float64)
    assert norm == pytest.approx(np.linalg.norm(wide, axis=0).max(), rel=1e-14)
    assert largest == pytest.approx(np.abs(wide).max(axis=1).sum(), rel=1e-14)
    scaled = wide * np.repeat(scales, ranks)[:, None]
    np.testing.assert_allclose(factors.gram, scaled @ scaled.T, rtol=1e-12, atol=1e-12 * np.abs(scaled).max() ** 2)
