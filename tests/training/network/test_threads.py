"""The parts of a loop together do what one part does, and the number of threads changes no bit."""

import os
from itertools import pairwise

import numpy as np
import pytest
import torch

from adaptkit.numerics.absmax import dynamic_levels
from adaptkit.numerics.kernels.codebook import NF4
from adaptkit.training.fast import cpu_attention, cpu_layers
from adaptkit.training.network.decode import Blocks, NestedConstants, decode, in_plain_torch
from adaptkit.training.network.threads import in_parts


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "elements", "expected"), [(0, 0, 1), (1000, 1000, 1), (3, 2**20, 3), (1000, 2**18, 4), (1003, 2**20, 4)]
)
def test_every_row_is_in_one_part_and_few_elements_are_not_divided(rows, elements, expected, threads):
    found = []
    in_parts(rows, elements, lambda *part: found.append(part))
    assert [part for part, _, _ in sorted(found)] == list(range(expected))
    assert [0, *(end for _, _, end in sorted(found))] == [*(start for _, start, _ in sorted(found)), rows]


def test_an_error_in_any_part_is_raised(threads):
    for bad in range(4):
        with pytest.raises(ZeroDivisionError):
            in_parts(1000, 2**20, lambda part, start, end, bad=bad: 1 // (part - bad))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_starts_its_own_threads(threads):
    in_parts(1000, 2**20, lambda *part: None)
    child = os.fork()
    if not child:
        seen = np.zeros(1000)
        in_parts(1000, 2**20, lambda part, start, end: seen[start:end].fill(1))
        os._exit(int(not seen.all()))
    assert os.waitpid(child, 0)[1] == 0


HEADS, ROWS, WIDTH = 2, 301, 1024


def floats(seed, *shape):
    return torch.randn(shape or (HEADS, ROWS, WIDTH), generator=torch.Generator().manual_seed(seed))


def softmax():
    scores, last = floats(0).bfloat16(), np.arange(WIDTH - ROWS, WIDTH, dtype=np.int32)
    return scores, torch.from_numpy(cpu_attention.softmax(scores, np.zeros_like(last), last, np.float32(0.3)))


def gradients():
    scores, changes, last = floats(0), floats(1), np.arange(WIDTH - ROWS, WIDTH, dtype=np.int32)
    sums, means = floats(2, HEADS * ROWS).numpy(), floats(3, HEADS, ROWS, 1)
    cpu_attention.gradients(scores, changes, np.zeros_like(last), last, np.float32(0.3), sums, means)
    return scores, changes


def blocks():
    generator, count = torch.Generator().manual_seed(0), 2**20 // 64 + 7
    codes = torch.randint(0, 256, (count * 32,), generator=generator, dtype=torch.uint8)
    small = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    constants = NestedConstants(small, torch.rand(-(-count // 256), generator=generator), 0.04)
    return Blocks(codes, constants, torch.from_numpy(dynamic_levels()), count * 64 - 5, 64, NF4)


def decoded():
    return (decode(blocks(), torch.bfloat16),)


def norm():
    x, weight, grad = floats(0), floats(1, WIDTH), floats(2)
    y, scales = cpu_layers.norm_forward(x, weight, 1e-5, True)
    return y, cpu_layers.norm_backward(x, weight, True, scales, grad)


def gate():
    gate, up, grad = (floats(seed).bfloat16() for seed in range(3))
    return cpu_layers.gate_forward(gate, up), *cpu_layers.gate_backward(gate, up, grad)


@pytest.mark.parametrize("compute", [softmax, gradients, decoded, norm, gate])
def test_the_number_of_threads_does_not_change_the_bits(compute, threads):
    found = []
    for count in (1, 4, 5, 7):
        torch.set_num_threads(count)
        found.append(compute())
    for one, other in pairwise(found):
        assert all(map(torch.equal, one, other))


def test_a_weight_that_threads_decode_has_the_bits_of_plain_torch(threads):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(decode(blocks(), dtype), in_plain_torch(blocks(), dtype))
