"""Worked examples of the lecture that adaptkit started from, and properties of int8."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.formats._format import encoding_of
from adaptkit.formats.int8 import FORMAT
from adaptkit.numerics.grids import INT8
from adaptkit.numerics.spec import TensorSpec

VALUES = [1.5, 2.3, 3.7, 4.1, 5.6, 6.8, 7.9, 8.4, 9.2, 10.2]


def absmax_codes(values):
    """The lecture's formula, round(127 / absmax · X)."""
    absmax = np.abs(values).max(axis=-1, keepdims=True)
    return INT8.nearest((np.float32(127) / absmax * values).reshape(-1)).view(np.int8), absmax


def test_the_lectures_example_follows_its_formula():
    """The lecture prints 18 and 69 for 18.68 and 69.73; its own formula gives 19 and 70."""
    codes, absmax = absmax_codes(np.float32(VALUES))
    assert codes.tolist() == [19, 29, 46, 51, 70, 85, 98, 105, 115, 127]
    assert 127 / float(absmax[0]) == pytest.approx(12.4509, abs=1e-4)  # the lecture truncates it
    assert np.abs(codes / (127 / absmax) - VALUES).max() <= absmax[0] / 254


def test_doubly_quantized_constants_take_34_bytes_instead_of_100():
    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).numpy()
    codes, constants = absmax_codes(matrix)
    parts = [codes, *absmax_codes(constants.reshape(1, 5))]
    assert [part.nbytes for part in parts] == [25, 5, 4]
    assert sum(part.nbytes for part in parts) == 34
    assert matrix.nbytes == 100


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**31))
def test_the_error_is_at_most_half_a_step_of_the_row(columns, rows, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).numpy()
    step = np.abs(weight).max(axis=1, keepdims=True) / 127 * (1 + 2**-8)  # a scale is rounded to bfloat16
    assert (abs(FORMAT.round_trip(weight, encoding_of("int8")) - weight) <= step * 0.51 + step * 127 * 2**-8).all()


def test_an_outlier_spoils_only_its_row():
    weight = np.full((2, 64), 0.01, np.float32)
    weight[0, 3] = 100.0
    error = abs(FORMAT.round_trip(weight, encoding_of("int8")) - weight)
    assert float(error[0].max()) >= 0.01
    assert float(error[1].max()) < 1e-4


def test_rows_of_zeros_stay_zero():
    weight = TensorSpec("x.weight", "BF16", (2, 32))
    piece = FORMAT.encode(np.zeros(64, np.float32), weight, encoding_of("int8"))
    assert not piece.codes.any()
    assert (piece.constants > 0).all()
