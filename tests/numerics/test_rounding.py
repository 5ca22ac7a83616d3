"""Error-compensating rounding changes the outputs of a linear less if its inputs are correlated."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import UsageError
from adaptkit.numerics import calibration, rounding
from adaptkit.numerics.absmax import dequantize_absmax
from adaptkit.numerics.calibration import weighted_nf4
from adaptkit.numerics.dtypes import BFLOAT16
from adaptkit.numerics.kernels import reference
from adaptkit.numerics.kernels.codebook import NF4, NF4_LEVELS
from adaptkit.numerics.rounding import compensated_nf4, compensation_factor, damped
from adaptkit.numerics.tensors import as_array


def correlated(columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    mixing[:, : columns // 4] *= 4
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mixing.T
    return as_array(inputs.T @ inputs / len(inputs))


def normal(rows, columns, seed):
    return as_array(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def decode(weight, codes, constants, block_size):
    absmax = dequantize_absmax(constants)
    return reference.decode_4bit(codes, absmax, weight.size, block_size, NF4, np.float32).reshape(weight.shape)


def output_loss(weight, codes, constants, second_moment, block_size=64):
    lost = weight.astype(np.float64) - decode(weight, codes, constants, block_size)
    return float(((lost @ second_moment) * lost).sum())


@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (128, 32), (256, 128), (100, 64), (72, 32)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_outputs_change_less_than_with_rounding_to_nearest(columns, block_size, double_quant):
    second_moment = correlated(columns)
    weight = normal(40, columns, 1).astype(BFLOAT16)
    importance = second_moment.diagonal()
    nearest = weighted_nf4(weight, importance, block_size, double_quant)
    factor = compensation_factor(second_moment)
    found = compensated_nf4(weight, importance, factor, block_size, double_quant)
    assert output_loss(weight, *found, second_moment, block_size) < 0.8 * output_loss(
        weight, *nearest, second_moment, block_size
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([48, 64, 96, 130, 200]), st.integers(1, 20))
def test_codes_match_the_plain_recursion_in_float64(seed, columns, rows):
    second_moment = correlated(columns, seed % 1000)
    weight = normal(rows, columns, seed)
    importance = second_moment.diagonal()
    codes, scales = compensated_nf4(weight, importance, compensation_factor(second_moment), double_quant=False)
    factor = np.linalg.cholesky(np.linalg.inv(damped(second_moment))).T  # L Lᵀ = H⁻¹, so Lᵀ is the upper factor
    levels = np.array(NF4_LEVELS)
    elements = scales.astype(np.float64).repeat(64)[: rows * columns].reshape(rows, columns)
    found = decode(weight, codes, scales, 64).astype(np.float64)
    work = weight.astype(np.float64)
    close_calls = 0
    for j in range(columns):
        grid = levels * elements[:, j : j + 1]
        distances = np.abs(work[:, j : j + 1] - grid)
        best, second = np.sort(distances, axis=1).T[:2]
        differs = np.abs(found[:, j] - grid[np.arange(rows), distances.argmin(1)]) > 1e-6
        close_calls += int(differs.sum())
        assert ((second - best) < 1e-4)[differs].all()
        error = (work[:, j] - found[:, j]) / factor[j, j]
        work[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :])
    assert close_calls <= 2


def test_a_row_is_rounded_alike_alone_and_among_more_rows_than_are_processed_together():
    weight = normal(2 * rounding.ROWS + 1, 256, 4)
    second_moment = correlated(256)
    arguments = second_moment.diagonal(), compensation_factor(second_moment), 64, False
    together, scales = compensated_nf4(weight, *arguments)
    alone = [compensated_nf4(row[None], *arguments) for row in weight]
    assert np.array_equal(together, np.concatenate([codes for codes, _ in alone]))
    assert np.array_equal(scales, np.concatenate([found for _, found in alone]))


def test_uncorrelated_inputs_give_the_codes_of_weighted_nf4(monkeypatch):
    monkeypatch.setattr(calibration, "REACH", 0)
    monkeypatch.setattr(rounding, "REACH", 0)
    weight, importance = normal(9, 128, 2), np.abs(normal(1, 128, 3)[0]) + 0.1
    factor = compensation_factor(np.diag(importance))
    codes, constants = compensated_nf4(weight, importance, factor)
    expected_codes, expected = weighted_nf4(weight, importance)
    assert np.array_equal(constants.codes, expected.codes)
    assert np.array_equal(codes, expected_codes)


def test_all_zero_inputs_count_as_uncorrelated():
    assert np.array_equal(compensation_factor(np.zeros((5, 5))), np.eye(5))


def test_second_moments_of_the_wrong_shape_are_refused():
    with pytest.raises(UsageError, match="factor"):
        compensated_nf4(np.ones((2, 64)), np.ones(64), np.eye(32))
    with pytest.raises(UsageError, match="square"):
        compensation_factor(np.ones((3, 4)))


MEASURE = """
import re
from pathlib import Path
import numpy as np
from adaptkit.numerics.rounding import compensation_factor

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

compensation_factor(np.eye(64, dtype=np.float32))
second_moment = np.eye(2048, dtype=np.float32) + np.float32(0.5 / 2048)
before = peak()
compensation_factor(second_moment)
print((peak() - before) / (8 * second_moment.size))
"""


def test_the_compensation_factor_takes_the_memory_of_two_matrices():
    """In float64; for the 14,336 inputs of an MLP one is 1.6 GB. Keeping every intermediate result takes 3.4."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.6
