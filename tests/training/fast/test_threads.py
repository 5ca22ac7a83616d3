"""The parts of a shared kernel together give what one part gives."""

import os

import numpy as np
import pytest
import torch

from adaptkit.training.fast import cpu_attention, cpu_joined, cpu_layers, cpu_loss
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


ROWS, WIDTH = 301, 1024


def floats(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape or (ROWS, WIDTH)).astype(np.float32)


def bits(seed, *shape):
    return (floats(seed, *shape).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def spans():
    return np.zeros(ROWS, np.int32), np.arange(WIDTH - ROWS, WIDTH, dtype=np.int32)


CASES = {
    cpu_attention.softmax_block: lambda: (
        bits(0),
        *spans(),
        np.float32(0.3),
        floats(1, ROWS),
        np.zeros((4, WIDTH), "f"),
    ),
    cpu_attention.gradient_block: lambda: (
        *(bits(0), bits(1), *spans(), np.float32(0.3), floats(2, ROWS), floats(3, ROWS)),
    ),
    cpu_attention.row_products: lambda: (bits(0), bits(1), floats(2, ROWS)),
    cpu_layers.norm_backward: lambda: (bits(0), bits(1, WIDTH), True, floats(3, ROWS), bits(4), bits(5)),
    cpu_layers.gate_forward: lambda: tuple(bits(seed, ROWS * WIDTH) for seed in range(3)),
    cpu_layers.gate_backward: lambda: tuple(bits(seed, ROWS * WIDTH) for seed in range(5)),
    cpu_loss.cross_entropy: lambda: (bits(0), np.arange(ROWS), True, np.zeros(ROWS)),
    cpu_joined._add: lambda: (floats(0), bits(1), np.float32(0.3)),
}


@pytest.mark.parametrize("kernel", CASES, ids=lambda kernel: kernel.__name__)
def test_the_number_of_threads_does_not_change_the_bits(kernel):
    def written(count):
        torch.set_num_threads(count)
        arguments = CASES[kernel]()
        kernel(*arguments)
        outputs = arguments[:-1] if kernel is cpu_attention.softmax_block else arguments  # the last one is scratch
        return [array.tobytes() for array in outputs if isinstance(array, np.ndarray)]

    before = torch.get_num_threads()
    try:
        alone = written(1)
        assert alone != [array.tobytes() for array in CASES[kernel]() if isinstance(array, np.ndarray)][: len(alone)]
        assert written(2) == written(3) == written(4) == alone
    finally:
        torch.set_num_threads(before)
