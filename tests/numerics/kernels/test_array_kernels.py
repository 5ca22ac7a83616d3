"""CPU kernels compute the same for arrays as for tensors, and return arrays for arrays, without torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from adaptkit.formats import fp4, int8, nf4
from adaptkit.numerics import absmax as constants
from adaptkit.numerics import exact
from adaptkit.numerics.absmax import squared_errors
from adaptkit.numerics.arrays import as_array, as_tensor
from adaptkit.numerics.kernels import _cpu_factors
from adaptkit.numerics.lora import LowRank

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def same(array, tensor):
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    expected = as_array(tensor)
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (3, 77), (1, 1)])
@pytest.mark.parametrize("form", [nf4.FORMAT, fp4.FORMAT, int8.FORMAT], ids=lambda form: form.name)
def test_arrays_and_tensors_quantize_and_dequantize_to_the_same_bits(form, shape, dtype):
    weight = torch.randn(shape, generator=seeded(1)).to(dtype)
    packed, again = (form.quantize(w, 64, measure=True) for w in (as_array(weight), weight))
    for ours, theirs in zip(packed, again, strict=True):
        same(ours, theirs)
    sizes = weight.numel(), 64
    same(form.dequantize(*packed[:2], *sizes, as_array(weight).dtype), form.dequantize(*again[:2], *sizes, dtype))
    whole = float(packed[2][:, 0].sum(dtype=np.float64))
    lost = squared_errors(whole, np.ascontiguousarray(packed[2][:, 1:]), packed[1])
    decoded = form.dequantize(*again[:2], *sizes, torch.float32).view(shape)
    exactly = (weight.double() - decoded.double()).square().sum()
    assert lost == pytest.approx(float(exactly), rel=1e-4, abs=1e-5 * whole)
    assert whole == pytest.approx(float(weight.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("count", [1, 255, 256, 1000])
def test_constants_quantize_to_the_same_bytes_from_arrays_and_tensors(count):
    absmax = torch.rand(count, generator=seeded(count))
    nested, again = (constants.quantize_absmax(values) for values in (as_array(absmax), absmax))
    same(nested.codes, again.codes)
    same(nested.nested_absmax, again.nested_absmax)
    assert nested.offset == again.offset
    same(constants.dequantize_absmax(nested), constants.dequantize_absmax(again))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_undo", [True, False])
def test_arrays_and_tensors_merge_and_unmerge_to_the_same_bits(dtype, with_undo):
    weight = (torch.randn(40, 900, generator=seeded(2)) * 0.05).to(dtype)
    terms = [
        LowRank.of_tensors(
            torch.randn(rank, 900, generator=seeded(rank)).to(stored),
            torch.randn(40, rank, generator=seeded(rank + 1)).to(stored),
            0.01,
        )
        for rank, stored in ((4, torch.bfloat16), (3, torch.float32))
    ]
    prepared = exact.prepare(terms)
    found = exact.merge_rows(as_array(weight), prepared, 0, with_undo)
    expected = exact.merge_rows(weight, prepared, 0, with_undo)
    same(found.weight, expected.weight)
    same(found.residual, expected.residual)
    assert (found.moved, found.squared_delta, found.overlap) == (
        expected.moved,
        expected.squared_delta,
        expected.overlap,
    )
    if with_undo:
        same(exact.unmerge_rows(found.weight, prepared, 0, found.residual), weight)
    assert torch.equal(as_tensor(terms[0].a), terms[0].lora_a)


@pytest.mark.parametrize("shape", [(1, 5), (7, 768), (5, 2000)])
def test_bounds_and_inner_products_of_the_factors_match_their_formulas(shape):
    """The trusted range of float32 arithmetic depends on them."""
    generator = np.random.default_rng(3)
    a = (generator.standard_normal(shape) * generator.uniform(0, 2, shape[1])).astype(np.float32)
    ranks, scales = ([shape[0]], [0.7]) if shape[0] == 1 else ([2, shape[0] - 2], [0.7, -3.0])
    factors = _cpu_factors.prepare(a, np.ones((4, shape[0]), np.float32), ranks, scales)
    norms, largest = factors._bounds
    wide = a.astype(np.float64)
    np.testing.assert_allclose(norms, np.sqrt(np.square(wide).cumsum(axis=0).max(axis=1)), rtol=1e-14)
    assert largest == pytest.approx(np.abs(wide).max(axis=1).sum(), rel=1e-14)
    scaled = wide * np.repeat(scales, ranks)[:, None]
    np.testing.assert_allclose(factors.gram, scaled @ scaled.T, rtol=1e-12, atol=1e-12 * np.abs(scaled).max() ** 2)


WITHOUT = """
import sys
import numpy as np, ml_dtypes
from adaptkit.numerics import exact
from adaptkit.formats import nf4
from adaptkit.formats._format import Encoding
from adaptkit.numerics.lora import LowRank, transposed

weight = np.full((64, 64), 0.5, ml_dtypes.bfloat16)
nf4.FORMAT.round_trip(weight, Encoding())
term = transposed(LowRank(np.ones((2, 64), np.float32), np.ones((64, 2), np.float32), 0.1)).weighted(2.0)
prepared = exact.prepare([term])
merged = exact.merge_rows(weight, prepared, 0, True)
assert (exact.unmerge_rows(merged.weight, prepared, 0, merged.residual) == weight).all()
print("torch" in sys.modules)
"""


def test_quantizing_and_merging_arrays_does_not_load_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
