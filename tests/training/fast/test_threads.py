"""The parts of a shared kernel together give what one part gives."""

import os

import numpy as np
import pytest
import torch

from adaptkit.training.fast.threads import shared


@shared("x")
def double(x, y, parts, part):
    for i in range(part[1], part[2]):
        y[i] += 2 * x[i]
    parts[part[0]] += 1


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "expected"), [(0, 1), (1000, 1), (2**18, 4), (2**20 + 7, 4)])
def test_every_row_of_a_shared_kernel_is_in_one_part(size, expected, threads):
    x, y, parts = np.arange(size), np.zeros(size, np.int64), np.zeros(4, np.int64)
    double(x, y, parts)
    assert (y == 2 * x).all()
    assert parts.tolist() == [1] * expected + [0] * (4 - expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_starts_its_own_threads(threads):
    x = np.arange(2**18)
    double(x, np.zeros_like(x), np.zeros(4, np.int64))
    child = os.fork()
    if not child:
        y = np.zeros_like(x)
        double(x, y, np.zeros(4, np.int64))
        os._exit(int((y != 2 * x).any()))
    assert os.waitpid(child, 0)[1] == 0
