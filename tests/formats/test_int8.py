"""Worked examples of the lecture that adaptkit started from, and properties of int8."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.formats import int8
from adaptkit.numerics.kernels._reference_blocks import int8_factors

VALUES = [1.5, 2.3, 3.7, 4.1, 5.6, 6.8, 7.9, 8.4, 9.2, 10.2]


def test_the_lectures_example_follows_its_formula():
    """The lecture prints 18 and 69 for 18.68 and 69.73; its own formula, round(127 / absmax · X), gives 19 and 70."""
    quantized = int8.quantize(torch.tensor(VALUES), block_size=len(VALUES))
    assert quantized.codes.tolist() == [19, 29, 46, 51, 70, 85, 98, 105, 115, 127]
    assert float(int8_factors(quantized.absmax)) == pytest.approx(12.4509, abs=1e-4)  # the lecture truncates it


def test_doubly_quantized_constants_take_34_bytes_instead_of_100():
    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    first = int8.quantize(matrix, block_size=5)
    second = int8.quantize(first.absmax, block_size=5)
    parts = [first.codes, second.codes, second.absmax]
    assert [part.nbytes for part in parts] == [25, 5, 4]
    assert sum(part.nbytes for part in parts) == 34
    assert matrix.nbytes == 100


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**31))
def test_the_error_is_at_most_half_a_step(count, block_size, seed):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    quantized = int8.quantize(weight, block_size)
    step = (quantized.absmax / 127).repeat_interleave(block_size)[:count]
    error = (int8.dequantize(quantized, torch.float32) - weight).abs()
    assert (error <= step * 0.5001).all()


def test_an_outlier_spoils_only_its_block():
    weight = torch.full((128,), 0.01)
    weight[3] = 100.0
    error = (int8.dequantize(int8.quantize(weight, 64), torch.float32) - weight).abs()
    assert float(error[:64].max()) == pytest.approx(0.01)
    assert float(error[64:].max()) < 1e-6


def test_blocks_too_small_for_the_reciprocal_of_their_absmax_keep_their_values():
    weight = torch.tensor([1.0, -0.5, 0.25, 0.0]) * 1e-37
    restored = int8.dequantize(int8.quantize(weight), torch.float32)
    assert float((restored - weight).abs().max()) <= 1e-37 / 127
