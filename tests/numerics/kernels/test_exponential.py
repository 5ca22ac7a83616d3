"""The exponential of the attention and gate kernels."""

import numpy as np
import pytest

from adaptkit.compiled import jit
from adaptkit.numerics.kernels._cpu_attention import exponential


@jit
def exponentials(x, y):
    for i in range(x.size):
        y[i] = exponential(x[i])


@pytest.fixture(scope="module")
def every_result():
    """Numbers from -87 to 0, dense near 0, and their exponentials."""
    steps = np.linspace(0, 87, 3_000_001), np.logspace(-30, 1, 300_001)
    x = -np.concatenate(steps).astype(np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    return x, y


def test_the_exponential_is_within_two_units_in_the_last_place(every_result):
    x, y = every_result
    expected = np.exp(x.astype(np.float64))
    assert np.max(np.abs(y - expected) / np.spacing(expected.astype(np.float32))) < 2


def test_numbers_below_the_smallest_give_its_exponential():
    x = np.array([-87, -87.1, -1e30, -np.inf], np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    assert y[0] > 0
    assert np.all(y == y[0])
