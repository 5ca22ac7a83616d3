"""Kernels whose rows are divided among torch's threads give the bits of one thread, and all take part."""

import ctypes
import os
import pkgutil
import struct
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit import team
from adaptkit.numerics import kernels
from adaptkit.numerics.kernels import _cpu_adamw, _cpu_attention, _cpu_joined, _cpu_layers, _cpu_loss, _cpu_rotary
from adaptkit.numerics.kernels._cpu_float import float_bits
from adaptkit.team import Shared, shared, team_size
from adaptkit.training.network import attention, loss

ROWS, WIDTH = 301, 1024
THREADS = (2, 3, 7)


needs_team = pytest.mark.skipif(team._openmp() is None, reason="torch does not use GNU OpenMP")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrix(rows=ROWS, width=WIDTH, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def flat(seed):
    return float_bits(matrix(seed=seed).view(-1))


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
        float_bits(matrix()),
        float_bits(matrix(1)[0]),
        np.float32(1e-5),
        False,
        empty(ROWS),
        float_bits(matrix(seed=2)),
    ),
    _cpu_layers.norm_backward: lambda: (
        *(
            float_bits(matrix()),
            float_bits(matrix(1)[0]),
            True,
            floats(3)[:ROWS],
            float_bits(matrix(seed=1)),
            float_bits(matrix(seed=2)),
        ),
    ),
    _cpu_layers.gate_forward: lambda: (flat(0), flat(1), flat(2)),
    _cpu_layers.gate_backward: lambda: tuple(map(flat, range(5))),
    _cpu_rotary.rotate: lambda: (
        *(float_bits(matrix().view(ROWS, 16, 64)), float_bits(matrix(77, 64, 1)), float_bits(matrix(77, 64, 2)), True),
        float_bits(matrix(seed=3).view(ROWS, 16, 64)),
    ),
    _cpu_attention.softmax_block: lambda: (
        float_bits(matrix()),
        *spans(),
        np.float32(0.3),
        empty(ROWS),
        empty(8, WIDTH),
    ),
    _cpu_attention.gradient_block: lambda: (
        *(
            float_bits(matrix()),
            float_bits(matrix(seed=1)),
            *spans(),
            np.float32(0.3),
            floats(2)[:ROWS],
            floats(3)[:ROWS],
        ),
    ),
    _cpu_attention.row_products: lambda: (float_bits(matrix()), float_bits(matrix(seed=1)), empty(ROWS)),
    _cpu_loss.cross_entropy: lambda: (float_bits(matrix()), np.arange(ROWS), True, empty(ROWS, dtype=np.float64)),
    _cpu_adamw.update: lambda: (*map(floats, range(4)), *NUMBERS),
    _cpu_joined._beside: lambda: (
        float_bits(matrix()),
        float_bits(matrix(width=20, seed=1)),
        empty(ROWS, WIDTH + 32, dtype=np.uint16),
    ),
    _cpu_joined._add: lambda: (matrix().float().numpy(), float_bits(matrix(seed=1)), np.float32(0.3)),
    _cpu_joined._widen: lambda: widening(nested=False),
    _cpu_joined._widen_nested: lambda: widening(nested=True),
}
"""Functions that make the arguments of every shared kernel."""


def written(kernel, count):
    """The contents of a kernel's arguments after a call, except for softmax's last one, which is scratch space."""
    torch.set_num_threads(count)
    arguments = CASES[kernel]()
    before = [array.copy() for array in arguments if isinstance(array, np.ndarray)]
    kernel(*arguments)
    found = [array for array in arguments if isinstance(array, np.ndarray)]
    assert any(one.tobytes() != other.tobytes() for one, other in zip(before, found, strict=True))
    return [array.tobytes() for array in (found[:-1] if kernel is _cpu_attention.softmax_block else found)]


def test_every_shared_kernel_is_tested_here():
    names = [name for _, name, _ in pkgutil.iter_modules(kernels.__path__) if name.startswith("_cpu_")]
    modules = [import_module(f"{kernels.__name__}.{name}") for name in names]
    assert {found for module in modules for found in vars(module).values() if isinstance(found, Shared)} == set(CASES)


@needs_team
@pytest.mark.parametrize("kernel", CASES, ids=lambda kernel: kernel.function.__name__)
def test_the_number_of_threads_does_not_change_the_bits(kernel):
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
def test_as_many_threads_take_part_as_are_asked_for():
    torch.set_num_threads(7)
    *arguments, room = CASES[_cpu_attention.softmax_block]()
    _cpu_attention.softmax_block(*arguments, room, threads=2)
    assert [bool(row.any()) for row in room] == [True] * 2 + [False] * 6


@shared("array")
def first_number(array, part):
    return array[0]


def test_a_shared_kernel_that_returns_something_is_refused():
    with pytest.raises(TypeError, match="must return nothing"):
        first_number(np.ones(3))


@needs_team
def test_few_elements_are_not_divided():
    torch.set_num_threads(7)
    *arguments, room = CASES[_cpu_attention.softmax_block]()
    _cpu_attention.softmax_block(arguments[0][:100], *arguments[1:], room)  # enough for six threads, but not for a team
    assert not room[1:].any()


def test_without_openmp_one_thread_does_all_the_work(monkeypatch):
    torch.set_num_threads(3)
    monkeypatch.setattr(team, "_openmp", lambda: None)
    assert team_size() == 1
    *arguments, room = CASES[_cpu_attention.softmax_block]()
    _cpu_attention.softmax_block(*arguments, room)
    assert not room[1:].any()
    assert arguments[4].all()


def process(script, **variables):
    """Run a script in a new process; return its exit code and output."""
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", script]
    found = subprocess.run(command, env=environment, text=True, capture_output=True, check=False, timeout=120)
    return found.returncode, found.stdout, found.stderr


KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64))


def run_noting(rows, useful, status=0):
    """Run a kernel that returns ``status``; return what each part of the team is given."""
    noted = []

    def note(result, failure, cells):
        noted.append(tuple(cells[:5]))
        return status

    kernel = KERNEL(note)
    team.run(ctypes.cast(kernel, ctypes.c_void_p).value, struct.pack("5q", 11, -22, 0, 0, 0), rows, useful)
    return sorted(noted)


@needs_team
@given(rows=st.integers(1, 1 << 40), useful=st.integers(1, 6), more=st.integers(0, 3))
@settings(max_examples=50)
def test_parts_cover_all_rows_in_order_and_evenly(rows, useful, more):
    torch.set_num_threads(useful + more)
    *known, thread, first, last = zip(*run_noting(rows, useful), strict=True)
    assert known == [(11,) * useful, (-22,) * useful]
    assert thread == tuple(range(useful))
    assert (0, *last) == (*first, rows)
    assert max(last[i] - first[i] for i in thread) - min(last[i] - first[i] for i in thread) <= 1


@needs_team
def test_openmp_may_give_fewer_threads_than_torch_has():
    script = "import torch, test_team; torch.set_num_threads(4); print(test_team.run_noting(10, 4))"
    environment = os.environ | {
        "OMP_THREAD_LIMIT": "2",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    found = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, check=True)
    assert found.stdout.strip() == "[(11, -22, 0, 0, 5), (11, -22, 1, 5, 10)]"


@needs_team
def test_a_part_that_fails_raises_an_error():
    torch.set_num_threads(3)
    with pytest.raises(SystemError, match=r"failed \(7\)"):
        run_noting(10, 3, status=7)


RACE = """
import threading
import torch
import test_team
torch.set_num_threads(2)
start = threading.Barrier(4)
def work():
    start.wait()
    for _ in range(50):
        test_team._cpu_layers.gate_forward(*test_team.CASES[test_team._cpu_layers.gate_forward]())
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("fine")
"""

FORK = """
import os
import torch
import test_team
torch.set_num_threads(2)
kernel = test_team._cpu_layers.gate_forward
arguments = test_team.CASES[kernel]()  # torch's own operations would wait for threads that a child does not have
kernel(*arguments)
child = os.fork()
if child == 0:
    assert test_team.team_size() == 1
    kernel(*arguments)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@needs_team
@pytest.mark.parametrize("script", [RACE, FORK], ids=["threads that begin at once", "a fork"])
def test_teams_work_in_concurrent_threads_and_after_a_fork(script):
    assert process(script) == (0, "fine\n", "")


@needs_team
def test_smaller_teams_do_not_make_torch_start_new_threads():
    torch.set_num_threads(3)
    side = torch.ones(300, 300)

    total, change = torch.zeros(2, 200_000), torch.ones(2, 200_000)  # for two threads of three

    def threads_made():
        _ = side @ side
        before = set(os.listdir("/proc/self/task"))
        for _ in range(2):
            _cpu_joined.add_scaled(total, change, 1.0)
            _ = side @ side
        return set(os.listdir("/proc/self/task")) - before

    assert not threads_made()


@pytest.mark.parametrize(("count", "has_library", "expected"), [(2, False, True), (3, False, False), (3, True, True)])
def test_own_attention_and_loss_are_used_with_openmp_or_few_threads(count, has_library, expected, monkeypatch):
    if has_library and team._openmp() is None:
        pytest.skip("torch does not use GNU OpenMP")
    torch.set_num_threads(count)
    if not has_library:
        monkeypatch.setattr(team, "_openmp", lambda: None)
    side = torch.ones(1, 2, 9, 16)
    assert (attention._attend(torch.nn.Module(), side, side, side, None, {}) is not None) == expected
    assert loss._has_kernel(torch.zeros(3, 5)) == expected
