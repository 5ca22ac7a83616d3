"""The exponential of the attention and gate kernels."""

import numpy as np

from adaptkit.numerics.kernels._jit import jit
from adaptkit.training.fast.cpu_attention import exponential


@jit
def exponentials(x, y):
    for i in range(x.size):
        y[i] = exponential(x[i])


def test_the_exponential_is_within_two_units_in_the_last_place():
    steps = np.linspace(0, 87, 3_000_001), np.logspace(-30, 1, 300_001)
    x = -np.concatenate(steps).astype(np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    expected = np.exp(x.astype(np.float64))
    assert np.max(np.abs(y - expected) / np.spacing(expected.astype(np.float32))) < 2


def test_numbers_below_the_smallest_give_its_exponential():
    x = np.array([-87, -87.1, -1e30, -np.inf], np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    assert y[0] > 0
    assert np.all(y == y[0])
