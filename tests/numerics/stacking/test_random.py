"""Random numbers are determined by seed, module, adapter and row."""

import subprocess
import sys

import pytest
import torch

from adaptkit.numerics.stacking._random import uniform


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 17])
def test_rows_have_the_same_numbers_in_any_block(columns):
    whole = uniform(5, "m", 1, slice(0, 12), columns)
    for first, last in ((0, 1), (3, 8), (11, 12)):
        assert torch.equal(uniform(5, "m", 1, slice(first, last), columns), whole[first:last])


def test_numbers_are_uniform_and_distinct():
    numbers = uniform(0, "m", 0, slice(0, 200), 101)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert numbers.unique().numel() == numbers.numel()
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert torch.allclose(numbers.reshape(-1).histc(10, 0, 1) / numbers.numel(), torch.tensor(0.1).double(), atol=0.01)


def test_different_seeds_adapters_and_modules_give_different_numbers():
    seen = {
        float(uniform(seed, module, adapter, slice(0, 1), 1))
        for seed in (0, 1, 10)
        for module in ("a", "b", "0\na")
        for adapter in (0, 1)
    }
    assert len(seen) == 18


def test_numbers_are_the_same_in_every_process_and_release():
    expected = [0.484888292353285, 0.13250458448318359, 0.7920041703518127]
    code = (
        "from adaptkit.numerics.stacking._random import uniform\n"
        "print(uniform(7, 'model.layers.0', 2, slice(3, 4), 3).tolist())"
    )
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed}
        )
        assert done.stdout.strip() == str([expected])
