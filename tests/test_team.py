"""Kernels whose rows are divided among torch's threads: they give the bits that one gives, and all take part."""

import pkgutil
from importlib import import_module

import numpy as np
import pytest
import torch

from adaptkit import team
from adaptkit.numerics import kernels
from adaptkit.numerics.kernels import _cpu_adamw, _cpu_attention, _cpu_joined, _cpu_layers, _cpu_loss, _cpu_rotary
from adaptkit.numerics.kernels._cpu_float import float_bits
from adaptkit.team import Shared, team_size

ROWS, WIDTH = 301, 1024
THREADS = (2, 3, 7)


def several_threads():
    torch.set_num_threads(2)
    return team_size() == 2


needs_team = pytest.mark.skipif(not several_threads(), reason="torch's threads are not of GNU's OpenMP here")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrix(rows=ROWS, width=WIDTH, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def bits(tensor):
    return float_bits(tensor)


def flat(seed):
    return bits(matrix(seed=seed).view(-1))


def floats(seed):
    return matrix(seed=seed).float().view(-1).abs().numpy().copy()


def spans():
    first = torch.arange(43, dtype=torch.int32)
    return first.numpy(), (first * 20 + 5).numpy()  # for each of seven heads


def empty(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def packed_rows(nested):
    rng = np.random.default_rng(0)
    blocks = ROWS * WIDTH // 64
    constants = rng.integers(0, 256, blocks, np.uint8) if nested else rng.random(blocks, np.float32)
    return _cpu_joined.PackedRows(
        codes=rng.integers(0, 256, ROWS * WIDTH // 2, np.uint8),
        constants=constants,
        nested=rng.random(-(-blocks // 256), np.float32) if nested else empty(0),
        offset=np.float32(0.5),
        nested_levels=np.linspace(-1, 1, 256, dtype=np.float32),
        width=WIDTH,
        block_size=64,
        levels=np.linspace(-1, 1, 16, dtype=np.float32),
    )


def widening(nested):
    weight = packed_rows(nested)
    constants = empty(weight.constants.size) if nested else weight.constants
    return (
        weight,
        constants,
        floats(1).reshape(ROWS, WIDTH)[:, :16],
        np.float32(2),
        WIDTH,
        empty(ROWS, WIDTH + 32, dtype=np.uint16),
    )


NUMBERS = [np.float32(number) for number in (0.999, 0.1, 0.99, 0.01, 1.5, 1e-8, -1e-3)]

CASES = {
    _cpu_layers.norm_forward: lambda: (
        bits(matrix()),
        bits(matrix(1)[0]),
        np.float32(1e-5),
        False,
        empty(ROWS),
        bits(matrix(seed=2)),
    ),
    _cpu_layers.norm_backward: lambda: (
        *(bits(matrix()), bits(matrix(1)[0]), True, floats(3)[:ROWS], bits(matrix(seed=1)), bits(matrix(seed=2))),
    ),
    _cpu_layers.gate_forward: lambda: (flat(0), flat(1), flat(2)),
    _cpu_layers.gate_backward: lambda: tuple(map(flat, range(5))),
    _cpu_rotary.rotate: lambda: (
        *(bits(matrix().view(ROWS, 16, 64)), bits(matrix(77, 64, 1)), bits(matrix(77, 64, 2)), True),
        bits(matrix(seed=3).view(ROWS, 16, 64)),
    ),
    _cpu_attention.softmax_block: lambda: (bits(matrix()), *spans(), np.float32(0.3), empty(ROWS), empty(8, WIDTH)),
    _cpu_attention.gradient_block: lambda: (
        *(bits(matrix()), bits(matrix(seed=1)), *spans(), np.float32(0.3), floats(2)[:ROWS], floats(3)[:ROWS]),
    ),
    _cpu_attention.row_products: lambda: (bits(matrix()), bits(matrix(seed=1)), empty(ROWS)),
    _cpu_loss.cross_entropy: lambda: (bits(matrix()), np.arange(ROWS), True, empty(ROWS, dtype=np.float64)),
    _cpu_adamw.update: lambda: (*map(floats, range(4)), *NUMBERS),
    _cpu_joined._beside: lambda: (
        bits(matrix()),
        bits(matrix(width=20, seed=1)),
        empty(ROWS, WIDTH + 32, dtype=np.uint16),
    ),
    _cpu_joined._round: lambda: (matrix().float().numpy(), empty(ROWS, WIDTH, dtype=np.uint16)),
    _cpu_joined._add: lambda: (matrix().float().numpy(), bits(matrix(seed=1)), np.float32(0.3)),
    _cpu_joined._widen: lambda: widening(nested=False),
    _cpu_joined._widen_nested: lambda: widening(nested=True),
}
"""Arguments of every shared kernel, made anew; ``room`` of a softmax comes last but for what it leaves."""


def written(kernel, count):
    """What a kernel leaves in its arguments."""
    torch.set_num_threads(count)
    arguments = CASES[kernel]()
    before = [array.copy() for array in arguments if isinstance(array, np.ndarray)]
    kernel(*arguments)
    found = [array for array in arguments if isinstance(array, np.ndarray)]
    assert any(one.tobytes() != other.tobytes() for one, other in zip(before, found, strict=True))
    return [array.tobytes() for array in (found[:-1] if kernel is _cpu_attention.softmax_block else found)]


def test_every_shared_kernel_is_here():
    names = [name for _, name, _ in pkgutil.iter_modules(kernels.__path__) if name.startswith("_cpu_")]
    modules = [import_module(f"{kernels.__name__}.{name}") for name in names]
    assert {found for module in modules for found in vars(module).values() if isinstance(found, Shared)} == set(CASES)


@needs_team
@pytest.mark.parametrize("kernel", CASES, ids=lambda kernel: kernel.function.__name__)
def test_parts_are_the_whole(kernel):
    alone = written(kernel, 1)
    for count in THREADS:
        assert written(kernel, count) == alone, count


@needs_team
@pytest.mark.parametrize("count", [1, *THREADS])
def test_as_many_threads_take_part_as_torch_has(count):
    torch.set_num_threads(count)
    *arguments, room = CASES[_cpu_attention.softmax_block]()
    _cpu_attention.softmax_block(*arguments, room)
    assert [bool(row.any()) for row in room] == [True] * count + [False] * (8 - count)


@needs_team
def test_few_elements_are_not_divided():
    torch.set_num_threads(7)
    *arguments, room = CASES[_cpu_attention.softmax_block]()
    _cpu_attention.softmax_block(*(side[:3] for side in arguments[:3]), *arguments[3:], room)
    assert not room[1:].any()


def test_without_the_library_one_thread_does_it_all(monkeypatch):
    torch.set_num_threads(3)
    monkeypatch.setattr(team, "_openmp", lambda: None)
    assert team_size() == 1
    *arguments, room = CASES[_cpu_attention.softmax_block]()
    _cpu_attention.softmax_block(*arguments, room)
    assert not room[1:].any()
    assert arguments[4].all()
