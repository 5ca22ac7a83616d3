"""Worked examples of the lecture that adaptkit started from, and properties of int8."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.formats._format import Encoding
from adaptkit.formats.int8 import FORMAT

VALUES = [1.5, 2.3, 3.7, 4.1, 5.6, 6.8, 7.9, 8.4, 9.2, 10.2]


def test_the_lectures_example_follows_its_formula():
    """The lecture prints 18 and 69 for 18.68 and 69.73; its own formula, round(127 / absmax · X), gives 19 and 70."""
    codes, absmax, _ = FORMAT.quantize(np.float32(VALUES), len(VALUES), False)
    assert codes.tolist() == [19, 29, 46, 51, 70, 85, 98, 105, 115, 127]
    assert 127 / float(absmax[0]) == pytest.approx(12.4509, abs=1e-4)  # the lecture truncates it


def test_doubly_quantized_constants_take_34_bytes_instead_of_100():
    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).numpy()
    codes, constants, _ = FORMAT.quantize(matrix, 5, False)
    parts = [codes, *FORMAT.quantize(constants, 5, False)[:2]]
    assert [part.nbytes for part in parts] == [25, 5, 4]
    assert sum(part.nbytes for part in parts) == 34
    assert matrix.nbytes == 100


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**31))
def test_the_error_is_at_most_half_a_step(count, block_size, seed):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    codes, absmax, _ = FORMAT.quantize(weight.numpy(), block_size, False)
    step = np.repeat(absmax / 127, block_size)[:count]
    error = abs(FORMAT.dequantize(codes, absmax, count, block_size, np.dtype(np.float32)) - weight.numpy())
    assert (error <= step * 0.5001).all()


def test_an_outlier_spoils_only_its_block():
    weight = np.full(128, 0.01, np.float32)
    weight[3] = 100.0
    error = abs(FORMAT.round_trip(weight, Encoding("int8")) - weight)
    assert float(error[:64].max()) == pytest.approx(0.01)
    assert float(error[64:].max()) < 1e-6


def test_blocks_too_small_for_the_reciprocal_of_their_absmax_keep_their_values():
    weight = np.float32([1.0, -0.5, 0.25, 0.0]) * np.float32(1e-37)
    assert float(abs(FORMAT.round_trip(weight, Encoding("int8")) - weight).max()) <= 1e-37 / 127
